// What a program of the npm package `openai` sees of the server at argv[2]: printed as one JSON object.
import OpenAI from 'openai'

const client = new OpenAI({ baseURL: process.argv[2], apiKey: 'none', maxRetries: 0 })
const model = process.argv[3]
const asked = { model, messages: [{ role: 'user', content: 'Hello' }], max_tokens: 24, seed: 7 }
const parameters = {
  type: 'object',
  properties: { unit: { enum: ['celsius', 'fahrenheit'] }, days: { type: 'integer', minimum: 1, maximum: 9 } },
  required: ['unit', 'days'],
  additionalProperties: false,
}
const told = {}

told.models = (await client.models.list()).data.map((each) => each.id)

const whole = await client.chat.completions.create(asked)
told.whole = whole.choices[0].message.content
told.usage = whole.usage

told.streamed = ''
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
  told.streamed += chunk.choices[0]?.delta?.content ?? ''
}

const helped = client.chat.completions.stream({ ...asked, stream_options: { include_usage: true } })
told.helped = (await helped.finalChatCompletion()).choices[0].message.content
told.helpedUsage = await helped.totalUsage()

const tools = [{ type: 'function', function: { name: 'forecast', parameters, strict: true } }]
const calling = { ...asked, max_tokens: 200, tools, tool_choice: 'required', parallel_tool_calls: false }
const called = (await client.chat.completions.create(calling)).choices[0]
told.call = called.message.tool_calls[0].function
told.callReason = called.finish_reason
const streamedCall = await client.chat.completions.stream(calling).finalChatCompletion()
told.streamedCall = streamedCall.choices[0].message.tool_calls[0].function

told.results = []
const runner = client.chat.completions.runTools(
  {
    ...asked,
    max_tokens: 200,
    tools: [
      {
        type: 'function',
        function: {
          name: 'forecast',
          parameters,
          parse: JSON.parse,
          function: (given) => (told.results.push(given), 'sunny'),
        },
      },
    ],
    tool_choice: { type: 'function', function: { name: 'forecast' } },
    parallel_tool_calls: false,
  },
  { maxChatCompletions: 1 },
)
await runner.done()
told.runnerRoles = runner.messages.map((each) => each.role)

const format = { type: 'json_schema', json_schema: { name: 'weather', schema: parameters, strict: true } }
const parsed = await client.chat.completions.parse({ ...asked, max_tokens: 200, response_format: format })
told.parsed = parsed.choices[0].message.parsed

const response = await client.responses.create({ model, input: 'Hello', max_output_tokens: 24 })
told.response = response.output_text
told.retrieved = (await client.responses.retrieve(response.id)).output_text
const next = { model, input: 'More', previous_response_id: response.id, max_output_tokens: 16, stream: true }
told.events = []
told.deltas = ''
for await (const event of await client.responses.create(next)) {
  told.events.push(event.type)
  if (event.type === 'response.output_text.delta') told.deltas += event.delta
  if (event.response) told.final = event.response.output
}
await client.responses.delete(response.id)
const flat = [{ type: 'function', name: 'forecast', parameters, strict: true }]
const acted = await client.responses.create({ model, input: 'Hello', tools: flat, tool_choice: 'required' })
told.acted = acted.output.filter((item) => item.type === 'function_call').map(({ name, arguments: given }) => [name, given])

const failures = {
  gone: () => client.responses.retrieve(response.id),
  model: () => client.chat.completions.create({ ...asked, model: 'gpt-9' }),
  range: () => client.chat.completions.create({ ...asked, temperature: 9 }),
}
told.failures = {}
for (const [name, attempt] of Object.entries(failures)) {
  told.failures[name] = await attempt().then(
    () => 'answered',
    (error) => [error.constructor.name, error.status, error.code, error.param],
  )
}
console.log(JSON.stringify(told))
