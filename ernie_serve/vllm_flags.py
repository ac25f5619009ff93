"""What vLLM's flags that are not here come to: nothing to say, another way, or not offered.

Knows their names and a phrase for each, which docs/api.md repeats. Knows nothing of how a command line is read.
"""

from fnmatch import fnmatchcase

ELSEWHERE: tuple[tuple[str, str], ...] = (
    ("--model", "the model is a word without a flag"),
    ("-q", "spelled --quantization"),
    ("--trust-remote-code --code-revision", "never needed: no code of a checkpoint is run"),
    (
        "--tokenizer --tokenizer-mode --tokenizer-revision --skip-tokenizer-init",
        "the checkpoint's own is taken, from its folder",
    ),
    (
        "--chat-template --chat-template-content-format --trust-request-chat-template",
        "the checkpoint's own is taken; another may be the chat_template.jinja in a copy of its folder",
    ),
    ("--default-chat-template-kwargs", "requests say chat_template_kwargs"),
    (
        "--enable-auto-tool-choice --tool-call-parser --tool-parser-plugin --reasoning-parser* --enable-reasoning",
        "always on, in the way the checkpoint writes them: leave it out",
    ),
    ("--structured-outputs-config* --guided-decoding-*", "always on: leave it out"),
    ("--enable-chunked-prefill --max-*partial-prefills --async-scheduling", "always on: leave it out"),
    ("--enable-prompt-tokens-details --enable-request-id-headers", "always on: leave it out"),
    (
        "--tensor-parallel-size -tp --pipeline-parallel-size -pp --data-parallel-* -dp* --enable-expert-parallel "
        "--*-context-parallel-size --distributed-executor-backend",
        "one GPU only: a model is not split",
    ),
    ("--api-server-count --headless --nnodes --node-rank", "a server is one process for HTTP and one engine"),
    (
        "--enforce-eager --compilation-config* -O* --*cudagraph-* --max-seq-len-to-capture",
        "not offered: a GPU always records its decode steps",
    ),
    ("--long-prefill-token-threshold", "see --max-step-seconds"),
    ("--enable-force-include-usage", "requests say stream_options.include_usage"),
    (
        "--kv-cache-metrics --enable-server-load-tracking --otlp-traces-endpoint --collect-detailed-traces",
        "see /metrics",
    ),
    ("--generation-config --override-generation-config*", "generation_config.json holds; requests override it"),
    (
        "--hf-overrides* --hf-config-path --config-format --model-impl --rope-* --runner --task",
        "config.json holds as it is",
    ),
    ("--seed", "requests say seed; without one theirs is drawn"),
    (
        "--enable-log-* --disable-log-* --disable-*access-log* --uvicorn-log-level --log-config-file --max-log-len",
        "see --log-level; prompts and answers are never logged",
    ),
    ("--root-path --ssl-* --enable-ssl-refresh --uds --middleware", "a proxy's job: docs/deploy.md"),
    ("--allowed-methods --allowed-headers --allow-credentials", "see --allowed-origins, which is all"),
    ("--num-gpu-blocks-override", "see --kv-cache-memory-bytes"),
    ("--swap-space --cpu-offload-* --kv-offloading-*", "not offered; --quantization makes a model smaller"),
    ("--download-dir --hf-token", "HF_HOME and HF_TOKEN in the environment"),
    (
        "--safetensors-load-strategy --model-loader-extra-config --ignore-patterns --calculate-kv-scales "
        "--num-scheduler-steps --preemption-mode --disable-frontend-multiprocessing --disable-custom-all-reduce",
        "there is one way: leave it out",
    ),
    ("--max-logprobs --logprobs-mode", "20 at most, on completions 5, of the model's own distribution"),
    ("--limit-mm-per-prompt* --mm-* --allowed-local-media-path", "not offered: text alone is read"),
    ("--*lora*", "not offered: merge an adapter into its checkpoint"),
    (
        "--speculative-* --kv-transfer-* --enable-sleep-mode --attention-backend "
        "--enable-prompt-embeds --response-role --return-tokens-as-token-ids",
        "not offered",
    ),
)
"""Names as a shell would match them, and what is told of them."""


def elsewhere(name: str) -> str:
    """What is told of a flag, `--enable-x`, `--no-enable-x` or `--x.y`; empty where vLLM has none of that name."""
    bare = name.partition(".")[0]
    names = (bare, f"--{bare.removeprefix('--no-')}")
    return next((told for flags, told in ELSEWHERE if any(_is_one(each, flags) for each in names)), "")


def _is_one(name: str, flags: str) -> bool:
    return any(fnmatchcase(name, flag) for flag in flags.split())
