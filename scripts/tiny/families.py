"""The kinds of tools that conversations are about: their many names, parameters, questions and results.

Plain data: no tool of a conversation is written here as it stands; `tools.py` draws a name, parameter names and a
description for each. `{slot}` in a question is a parameter, in an answer a parameter or a field of the result.
"""

# ruff: noqa: E501  # sentences stand on one line each

from dataclasses import dataclass, field

from tiny.words import listed


@dataclass(frozen=True)
class Slot:
    """A parameter: the names it goes by, the kind of its value in English and Chinese, how it may be described."""

    names: list[str]
    kind: str
    kind_zh: str
    about: str
    type: str = "string"


@dataclass(frozen=True)
class Family:
    """One thing a tool can do. `extra` slots appear in some questions only and are not required."""

    names: list[str]
    about: list[str]
    slots: dict[str, Slot]
    asks: list[str]
    asks_zh: list[str]
    result: dict[str, str]
    answer: str
    answer_zh: str
    pairs: list[str] = field(default_factory=list)
    pairs_zh: list[str] = field(default_factory=list)
    extra: dict[str, Slot] = field(default_factory=dict)
    asks_extra: list[str] = field(default_factory=list)


CITY = Slot(["city", "location", "place", "city_name", "town", "where"], "city", "city_zh", "The name of the city")
PERSON = Slot(["name", "person", "contact", "to", "recipient", "user"], "person", "person_zh", "The name of the person")
UNIT = Slot(["unit", "units", "scale"], "unit", "unit", "The unit of the temperature")

FAMILIES: list[Family] = [
    Family(
        [
            "get_weather",
            "get_weather",
            "weather",
            "get_current_weather",
            "current_weather",
            "check_weather",
            "weather_lookup",
            "fetch_weather",
            "getWeather",
            "weather_report",
        ],
        [
            "Get the current weather for a city",
            "Get weather",
            "Look up the weather in a place",
            "Returns the current weather",
            "Get the current weather in a given location",
            "查询城市天气",
            "Get the weather of a city",
            "",
        ],
        {"city": CITY},
        [
            "What is the weather in {city}?",
            "What's the weather like in {city}?",
            "How is the weather in {city}?",
            "Weather in {city}?",
            "Tell me the weather in {city}.",
            "What's the weather in {city} today?",
            "Is it raining in {city}?",
            "Is it cold in {city}?",
            "Please check the weather in {city}.",
            "what's the weather in {city}",
            "Can you tell me the weather for {city}?",
            "Will I need an umbrella in {city}?",
        ],
        [
            "{city}天气怎么样？",
            "{city}今天天气怎么样？",
            "查一下{city}的天气。",
            "{city}的天气如何？",
            "请告诉我{city}的天气。",
            "{city}今天下雨吗？",
            "{city}冷吗？",
            "帮我查{city}天气",
        ],
        {"temperature": "small", "condition": "weather"},
        "It is {condition} in {city}, {temperature} degrees.",
        "{city}现在{condition}，{temperature}度。",
        [
            "What is the weather in {a} and {b}?",
            "What's the weather like in {a} and in {b}?",
            "Compare the weather in {a} and {b}.",
            "Weather in {a} and {b}?",
            "How is the weather in {a} and {b} today?",
            "Tell me the weather for {a} and {b}.",
        ],
        ["{a}和{b}的天气怎么样？", "查一下{a}和{b}的天气。", "{a}和{b}今天天气如何？"],
        {"unit": UNIT},
        [
            "What is the weather in {city} in {unit}?",
            "Weather in {city}, in {unit} please.",
            "How warm is it in {city} in {unit}?",
        ],
    ),
    Family(
        ["get_time", "current_time", "time_in_city", "get_local_time", "world_clock", "what_time"],
        [
            "Get the current time in a city",
            "Tells the local time of a place",
            "Look up what time it is somewhere",
            "查询城市的当前时间",
        ],
        {"city": CITY},
        [
            "What time is it in {city}?",
            "What is the time in {city}?",
            "Tell me the local time in {city}.",
            "What's the time in {city} now?",
            "Current time in {city}?",
        ],
        ["{city}现在几点？", "{city}现在几点了？", "查一下{city}的时间。"],
        {"time": "clock"},
        "It is {time} in {city}.",
        "{city}现在是{time}。",
        ["What time is it in {a} and in {b}?", "What is the time in {a} and {b}?"],
        ["{a}和{b}现在几点？"],
    ),
    Family(
        ["get_population", "population", "city_population", "population_of", "count_people"],
        ["Get the population of a city", "How many people live in a city", "查询城市人口"],
        {"city": CITY},
        [
            "How many people live in {city}?",
            "What is the population of {city}?",
            "Population of {city}?",
            "How big is the population of {city}?",
        ],
        ["{city}有多少人？", "{city}的人口是多少？"],
        {"population": "number"},
        "{city} has {population} people.",
        "{city}有{population}人。",
        ["What is the population of {a} and {b}?", "How many people live in {a} and in {b}?"],
        ["{a}和{b}的人口是多少？"],
    ),
    Family(
        ["get_stock_price", "stock_price", "stock_quote", "share_price", "get_quote", "lookup_stock"],
        ["Get the stock price of a company", "Look up a share price", "Returns the latest stock quote", "查询公司股价"],
        {
            "company": Slot(
                ["company", "symbol", "ticker", "stock", "company_name"], "company", "company", "The company"
            )
        },
        [
            "What is the stock price of {company}?",
            "How much is {company} stock?",
            "Price of {company} shares?",
            "What is the share price of {company}?",
            "Look up the {company} stock.",
        ],
        ["{company}的股价是多少？", "查一下{company}的股票。"],
        {"price": "decimal"},
        "The stock price of {company} is {price}.",
        "{company}的股价是{price}。",
        ["What is the stock price of {a} and {b}?", "Compare the stock price of {a} and {b}."],
        ["{a}和{b}的股价是多少？"],
    ),
    Family(
        ["send_email", "email", "write_email", "mail_send", "send_mail"],
        ["Send an email to someone", "Sends a mail", "Write and send an email", "发送邮件"],
        {
            "to": Slot(["to", "recipient", "address", "email"], "email", "email", "The address"),
            "body": Slot(["body", "text", "message", "content"], "text", "thing_zh", "What the mail says"),
        },
        [
            "Send an email to {to} saying {body}",
            "Email {to}: {body}",
            "Write an email to {to} with the text {body}",
            "Please send {to} an email that says {body}",
        ],
        ["给{to}发邮件：{body}", "发一封邮件给{to}，内容是{body}"],
        {"status": "=sent"},
        "The email to {to} has been sent.",
        "给{to}的邮件已发送。",
    ),
    Family(
        ["send_message", "message", "text_contact", "send_sms", "send_text"],
        ["Send a message to a person", "Sends a text message to a contact", "给联系人发消息"],
        {
            "to": PERSON,
            "text": Slot(["text", "message", "body", "content"], "text", "thing_zh", "The text of the message"),
        },
        [
            "Send a message to {to}: {text}",
            "Text {to}: {text}",
            "Tell {to} that {text}",
            "Message {to} saying {text}",
            "Send {to} the message {text}",
        ],
        ["给{to}发消息：{text}", "发消息给{to}说{text}"],
        {"status": "=sent"},
        "Your message to {to} has been sent.",
        "给{to}的消息已发送。",
    ),
    Family(
        ["call_contact", "phone_call", "make_call", "dial", "start_call"],
        ["Call a person on the phone", "Start a phone call with a contact", "打电话"],
        {"name": PERSON},
        ["Call {name}.", "Please call {name}.", "Give {name} a call.", "Phone {name}.", "I want to call {name}"],
        ["给{name}打电话。", "打电话给{name}"],
        {"status": "=calling"},
        "I am calling {name}.",
        "正在给{name}打电话。",
        ["Call {a} and {b}.", "Phone {a} and {b}."],
        ["给{a}和{b}打电话。"],
    ),
    Family(
        ["set_alarm", "alarm", "create_alarm", "wake_me", "alarm_set"],
        ["Set an alarm", "Set an alarm at a time", "Creates an alarm clock entry", "设置闹钟"],
        {"time": Slot(["time", "at", "alarm_time", "when"], "clock", "clock", "The time of the alarm")},
        [
            "Set an alarm for {time}.",
            "Wake me up at {time}.",
            "Set an alarm at {time}",
            "I need an alarm at {time}.",
            "Alarm at {time} please.",
        ],
        ["设一个{time}的闹钟。", "{time}叫我起床。", "把闹钟设在{time}"],
        {"status": "=ok"},
        "Your alarm is set for {time}.",
        "闹钟已设在{time}。",
        ["Set an alarm for {a} and for {b}.", "Set alarms at {a} and {b}."],
        ["设{a}和{b}的闹钟。"],
    ),
    Family(
        ["set_timer", "timer", "start_timer", "countdown", "create_timer"],
        ["Start a timer", "Start a countdown timer for some minutes", "设置计时器"],
        {
            "minutes": Slot(
                ["minutes", "duration", "length", "mins"], "small", "small", "The number of minutes", "integer"
            )
        },
        [
            "Set a timer for {minutes} minutes.",
            "Start a {minutes} minute timer.",
            "Timer for {minutes} minutes please.",
            "Count down {minutes} minutes.",
        ],
        ["设一个{minutes}分钟的计时器。", "倒计时{minutes}分钟。"],
        {"status": "=started"},
        "The timer for {minutes} minutes has started.",
        "{minutes}分钟的计时器已开始。",
    ),
    Family(
        ["create_reminder", "remind", "add_reminder", "set_reminder", "remind_me"],
        ["Create a reminder", "Reminds the user of something at a time", "创建提醒"],
        {
            "text": Slot(["text", "what", "task", "title"], "text", "thing_zh", "What to be reminded of"),
            "time": Slot(["time", "when", "at", "date"], "clock", "clock", "The time"),
        },
        [
            "Remind me to {text} at {time}.",
            "Set a reminder at {time}: {text}",
            "Create a reminder for {time}: {text}",
            "At {time} remind me: {text}",
        ],
        ["{time}提醒我{text}", "提醒我{time}{text}"],
        {"status": "=ok"},
        "I will remind you at {time}.",
        "我会在{time}提醒你。",
    ),
    Family(
        ["search_web", "web_search", "search", "google_search", "search_internet", "find_online"],
        ["Search the web", "Search the internet for something", "Look something up online", "搜索网页"],
        {"query": Slot(["query", "q", "keywords", "search_term", "text"], "title", "thing_zh", "What to search for")},
        [
            "Search the web for {query}.",
            "Search for {query}",
            "Look up {query} online.",
            "Google {query}",
            "Find {query} on the internet.",
        ],
        ["搜索{query}", "在网上搜一下{query}。", "帮我搜索{query}"],
        {"result": "text"},
        "I found this: {result}",
        "我找到了：{result}",
        ["Search the web for {a} and for {b}."],
        ["搜索{a}和{b}"],
    ),
    Family(
        ["play_music", "play_song", "music_player", "start_music", "play"],
        ["Play a song", "Play music", "Plays a song by its title", "播放歌曲"],
        {"song": Slot(["song", "title", "track", "name"], "title", "thing_zh", "The title of the song")},
        ["Play {song}.", "Play the song {song}.", "I want to hear {song}.", "Put on {song} please."],
        ["播放{song}", "我想听{song}。", "放一首{song}"],
        {"status": "=playing"},
        "{song} is playing now.",
        "正在播放{song}。",
    ),
    Family(
        ["translate", "translate_text", "translation", "get_translation", "translator"],
        ["Translate text into a language", "Translates a word or a sentence", "翻译文本"],
        {
            "text": Slot(["text", "sentence", "input", "content"], "text", "thing_zh", "The text"),
            "language": Slot(
                ["language", "target", "to", "target_language", "lang"],
                "language",
                "language",
                "The language to translate into",
            ),
        },
        [
            "Translate {text} into {language}.",
            "How do you say {text} in {language}?",
            "Translate to {language}: {text}",
            "What is {text} in {language}?",
        ],
        ["把{text}翻译成{language}。", "{text}用{language}怎么说？"],
        {"translation": "invented"},
        "In {language} it is: {translation}",
        "{language}是：{translation}",
    ),
    Family(
        ["convert_currency", "currency", "exchange_money", "currency_converter", "convert_money"],
        ["Convert an amount of money from one currency to another", "Currency converter", "货币换算"],
        {
            "amount": Slot(["amount", "value", "sum", "money"], "number", "number", "The amount", "number"),
            "source": Slot(
                ["from", "source", "from_currency", "base"], "currency", "currency", "The currency to convert from"
            ),
            "target": Slot(
                ["to", "target", "to_currency", "goal"], "currency", "currency", "The currency to convert to"
            ),
        },
        [
            "Convert {amount} {source} to {target}.",
            "How much is {amount} {source} in {target}?",
            "Exchange {amount} {source} to {target}.",
            "What is {amount} {source} in {target}?",
        ],
        ["{amount} {source}是多少{target}？", "把{amount} {source}换成{target}。"],
        {"result": "decimal"},
        "{amount} {source} is {result} {target}.",
        "{amount} {source}是{result} {target}。",
    ),
    Family(
        ["add", "add_numbers", "sum", "calculate_sum", "plus"],
        ["Add two numbers", "Calculates the sum of two numbers", "计算两数之和"],
        {
            "a": Slot(["a", "x", "first", "left"], "number", "number", "The first number", "number"),
            "b": Slot(["b", "y", "second", "right"], "number", "number", "The second number", "number"),
        },
        [
            "What is {a} plus {b}?",
            "Add {a} and {b}.",
            "{a} + {b} = ?",
            "Calculate the sum of {a} and {b}.",
            "What is {a} + {b}?",
        ],
        ["{a}加{b}是多少？", "计算{a}+{b}。"],
        {"result": "number"},
        "{a} plus {b} is {result}.",
        "{a}加{b}等于{result}。",
    ),
    Family(
        ["multiply", "multiply_numbers", "product", "times", "calculate_product"],
        ["Multiply two numbers", "Calculates the product of two numbers", "计算两数之积"],
        {
            "a": Slot(["a", "x", "first", "left"], "number", "number", "The first number", "number"),
            "b": Slot(["b", "y", "second", "right"], "number", "number", "The second number", "number"),
        },
        [
            "What is {a} times {b}?",
            "Multiply {a} by {b}.",
            "Calculate {a} * {b}.",
            "What is the product of {a} and {b}?",
            "{a} x {b} = ?",
        ],
        ["{a}乘以{b}是多少？", "计算{a}*{b}。"],
        {"result": "number"},
        "{a} times {b} is {result}.",
        "{a}乘以{b}等于{result}。",
    ),
    Family(
        ["book_flight", "flight_booking", "reserve_flight", "buy_plane_ticket", "find_flight"],
        ["Book a flight between two cities", "Book a plane ticket", "预订航班"],
        {
            "origin": Slot(
                ["origin", "from", "departure", "from_city", "source"], "city", "city_zh", "Where the flight starts"
            ),
            "goal": Slot(
                ["destination", "to", "arrival", "to_city", "target"], "city", "city_zh", "Where the flight goes"
            ),
        },
        [
            "Book a flight from {origin} to {goal}.",
            "I want to fly from {origin} to {goal}.",
            "Find me a flight from {origin} to {goal}.",
            "I need a plane ticket from {origin} to {goal}.",
        ],
        ["订一张从{origin}到{goal}的机票。", "我想从{origin}飞到{goal}。"],
        {"flight": "code"},
        "Your flight from {origin} to {goal} is {flight}.",
        "从{origin}到{goal}的航班是{flight}。",
        extra={"date": Slot(["date", "day", "when"], "date", "date", "The date of the flight")},
        asks_extra=[
            "Book a flight from {origin} to {goal} on {date}.",
            "I want to fly from {origin} to {goal} on {date}.",
        ],
    ),
    Family(
        ["book_hotel", "reserve_hotel", "hotel_booking", "find_hotel", "book_room"],
        ["Book a hotel in a city", "Reserve a hotel room", "预订酒店"],
        {"city": CITY},
        [
            "Book a hotel in {city}.",
            "I need a hotel in {city}.",
            "Find me a room in {city}.",
            "Reserve a hotel in {city} please.",
        ],
        ["帮我在{city}订一家酒店。", "我要在{city}住酒店。"],
        {"hotel": "title"},
        "I booked the hotel {hotel} in {city}.",
        "我在{city}订了{hotel}酒店。",
        extra={"nights": Slot(["nights", "days", "num_nights"], "small", "small", "How many nights", "integer")},
        asks_extra=["Book a hotel in {city} for {nights} nights.", "I need a room in {city} for {nights} nights."],
    ),
    Family(
        ["book_table", "reserve_table", "restaurant_booking", "make_reservation", "book_restaurant"],
        ["Reserve a table in a restaurant", "Book a table for some people", "预订餐厅座位"],
        {
            "restaurant": Slot(["restaurant", "name", "place", "venue"], "title", "thing_zh", "The restaurant"),
            "people": Slot(
                ["people", "guests", "party_size", "seats"], "small", "small", "The number of people", "integer"
            ),
        },
        [
            "Book a table at {restaurant} for {people} people.",
            "Reserve a table for {people} at {restaurant}.",
            "A table for {people} people at {restaurant} please.",
        ],
        ["在{restaurant}订{people}个人的座位。"],
        {"code": "code"},
        "Your table at {restaurant} is booked. The code is {code}.",
        "{restaurant}的座位已订好，编号{code}。",
    ),
    Family(
        ["get_news", "news", "latest_news", "fetch_news", "headlines"],
        ["Get the latest news about a topic", "Fetches news headlines", "获取新闻"],
        {"topic": Slot(["topic", "subject", "query", "about"], "thing", "thing_zh", "The topic")},
        [
            "What is the latest news about {topic}?",
            "Any news about {topic}?",
            "Show me the news on {topic}.",
            "Get me headlines about {topic}.",
        ],
        ["有什么关于{topic}的新闻？", "查一下{topic}的新闻。"],
        {"headline": "text"},
        "The latest news about {topic}: {headline}",
        "关于{topic}的新闻：{headline}",
        ["Any news about {a} and {b}?"],
        ["有什么关于{a}和{b}的新闻？"],
    ),
    Family(
        ["get_order_status", "track_order", "order_status", "find_order", "check_order"],
        ["Get the status of an order", "Track an order by its number", "查询订单状态"],
        {"order": Slot(["order_id", "order", "id", "number", "order_number"], "code", "code", "The order")},
        [
            "Where is my order {order}?",
            "What is the status of order {order}?",
            "Track order {order}.",
            "Has order {order} been shipped?",
        ],
        ["订单{order}到哪了？", "查询订单{order}的状态。"],
        {"status": "@shipped|on the way|delivered|delayed|lost"},
        "Your order {order} is {status}.",
        "订单{order}的状态是{status}。",
        ["Where are my orders {a} and {b}?"],
        ["订单{a}和{b}到哪了？"],
    ),
    Family(
        ["set_temperature", "thermostat", "heating", "set_heating", "change_temperature"],
        ["Set the temperature of the heating", "Controls the thermostat", "设置室内温度"],
        {"degrees": Slot(["degrees", "temperature", "value", "level"], "small", "small", "The temperature", "integer")},
        [
            "Set the temperature to {degrees} degrees.",
            "Set the heating to {degrees}.",
            "Make it {degrees} degrees in here.",
            "Turn the thermostat to {degrees}.",
        ],
        ["把温度调到{degrees}度。", "空调设为{degrees}度"],
        {"status": "=ok"},
        "The temperature is set to {degrees} degrees.",
        "温度已设为{degrees}度。",
    ),
    Family(
        ["control_light", "switch_light", "light", "set_light", "lamp_control"],
        ["Switch the light in a room on or off", "Controls a lamp", "控制灯光"],
        {
            "room": Slot(
                ["room", "place", "lamp", "area"],
                "@kitchen|bedroom|bathroom|hall|office|garage|garden|attic",
                "@厨房|卧室|客厅|书房",
                "The room",
            ),
            "state": Slot(["state", "action", "value", "mode"], "@on|off", "@on|off", "On or off"),
        },
        [
            "Turn {state} the light in the {room}.",
            "Turn the {room} light {state}.",
            "Switch {state} the {room} lamp.",
            "Lights {state} in the {room}.",
        ],
        ["把{room}的灯调到{state}。"],
        {"status": "=ok"},
        "The light in the {room} is {state}.",
        "{room}的灯已{state}。",
    ),
    Family(
        ["create_event", "add_event", "calendar_add", "schedule_meeting", "new_appointment"],
        ["Add an event to the calendar", "Schedules a meeting", "添加日程"],
        {
            "title": Slot(["title", "name", "event", "what"], "title", "thing_zh", "The title"),
            "date": Slot(["date", "day", "on", "when"], "date", "date", "The date"),
        },
        [
            "Add {title} to my calendar on {date}.",
            "Schedule {title} for {date}.",
            "Create an event on {date}: {title}",
            "Put {title} into the calendar for {date}.",
        ],
        ["{date}添加日程{title}。", "把{title}加到{date}的日历。"],
        {"status": "=ok"},
        "I added {title} on {date}.",
        "已在{date}添加{title}。",
    ),
    Family(
        ["add_to_cart", "buy_item", "order_product", "shop", "purchase"],
        ["Buy a product", "Put a product into the shopping cart", "购买商品"],
        {
            "item": Slot(["item", "product", "article", "name"], "thing", "thing_zh", "The product"),
            "count": Slot(["count", "quantity", "amount", "number"], "small", "small", "How many", "integer"),
        },
        [
            "Buy {count} of {item}.",
            "Order {count} {item} please.",
            "Put {count} {item} into my cart.",
            "I want to buy {count} {item}.",
        ],
        ["买{count}个{item}。", "把{count}个{item}加入购物车。"],
        {"price": "decimal"},
        "I ordered {count} {item} for {price}.",
        "已买{count}个{item}，价格{price}。",
    ),
    Family(
        ["get_directions", "route", "navigate", "find_route", "directions"],
        ["Find the way between two places", "Get directions from one place to another", "导航路线"],
        {
            "start": Slot(["start", "from", "origin", "from_place"], "city", "city_zh", "Where to start"),
            "end": Slot(["end", "to", "destination", "to_place"], "city", "city_zh", "Where to go"),
        },
        [
            "How do I get from {start} to {end}?",
            "Give me directions from {start} to {end}.",
            "Show me the way from {start} to {end}.",
            "What is the route from {start} to {end}?",
        ],
        ["从{start}到{end}怎么走？", "导航从{start}到{end}。"],
        {"distance": "number"},
        "From {start} to {end} it is {distance} kilometers.",
        "从{start}到{end}有{distance}公里。",
    ),
    Family(
        ["read_file", "open_file", "cat_file", "load_file", "file_read"],
        ["Read a file", "Returns the content of a file", "读取文件"],
        {"path": Slot(["path", "file", "filename", "file_name"], "file", "file", "The file")},
        ["Read the file {path}.", "Open {path}.", "What is in {path}?", "Show me the content of {path}"],
        ["读取文件{path}。", "打开{path}"],
        {"content": "text"},
        "The file says: {content}",
        "文件内容是：{content}",
        ["Read the files {a} and {b}."],
        ["读取{a}和{b}。"],
    ),
    Family(
        ["get_recipe", "recipe", "find_recipe", "cook", "recipe_search"],
        ["Find a recipe for a dish", "Look up how to cook something", "查询菜谱"],
        {"dish": Slot(["dish", "food", "name", "meal"], "thing", "thing_zh", "The dish")},
        ["How do I cook {dish}?", "Give me a recipe for {dish}.", "Find a recipe for {dish}.", "How do I make {dish}?"],
        ["{dish}怎么做？", "查一下{dish}的菜谱。"],
        {"minutes": "small"},
        "{dish} takes {minutes} minutes.",
        "{dish}需要{minutes}分钟。",
    ),
    Family(
        ["roll_dice", "dice", "throw_dice", "random_dice"],
        ["Roll a die", "Roll a die with some sides", "掷骰子"],
        {"sides": Slot(["sides", "n", "faces", "max"], "small", "small", "How many sides", "integer")},
        ["Roll a die with {sides} sides.", "Roll a {sides} sided die.", "Throw a die with {sides} faces."],
        ["掷一个{sides}面的骰子。"],
        {"result": "small"},
        "You rolled a {result}.",
        "掷出了{result}。",
    ),
    Family(
        ["create_note", "write_note", "save_note", "add_note", "note"],
        ["Save a note", "Writes down a note", "记笔记"],
        {"text": Slot(["text", "note", "content", "body"], "text", "thing_zh", "The text of the note")},
        ["Note: {text}", "Write down: {text}", "Save a note that says {text}", "Make a note: {text}"],
        ["记一下：{text}", "写一条笔记：{text}"],
        {"status": "=saved"},
        "I saved the note.",
        "笔记已保存。",
    ),
]

NEAR: list[set[str]] = [
    {"get_weather", "get_time", "get_population", "book_hotel"},
    {"send_email", "send_message", "call_contact"},
    {"set_alarm", "set_timer", "create_reminder", "create_event"},
    {"add", "multiply", "convert_currency", "roll_dice"},
    {"book_flight", "get_directions", "book_hotel"},
    {"book_table", "book_hotel", "get_recipe"},
    {"search_web", "get_news", "get_stock_price", "translate"},
    {"set_temperature", "control_light", "get_weather"},
    {"play_music", "call_contact", "control_light"},
    {"add_to_cart", "get_order_status", "book_table"},
    {"read_file", "create_note", "send_email"},
]
"""Families by the first of their names: those of one set look alike, yet none can do what another does."""

WISHES = [
    "Wash my car.",
    "Order a taxi to {city}.",
    "Call a taxi, please.",
    "Paint the {thing} {color}.",
    "Water the plants.",
    "Please water the {thing}.",
    "Fix my {thing}.",
    "Can you repair my {thing}?",
    "Cut my hair.",
    "Who won the match in {city}?",
    "What is the score of the game?",
    "Find me a doctor in {city}.",
    "Rent a car in {city}.",
    "Clean the {thing}.",
    "Feed my {animal}.",
    "Walk the {animal}.",
    "Take a picture of the {thing}.",
    "Draw a {animal}.",
    "Draw me a picture of a {thing}.",
    "Print the file {file}.",
    "Delete the file {file}.",
    "Rename {file} to {file}.",
    "Download {title}.",
    "Install {title} for me.",
    "Lock the door.",
    "Open the window.",
    "Close the {thing}.",
    "Start the washing machine.",
    "Charge my phone.",
    "Restart the server {code}.",
    "Cancel my subscription {code}.",
    "Pay the bill {code}.",
    "Transfer {number} {currency} to {person}.",
    "Lend me {number} {currency}.",
    "Sell my {thing}.",
    "Find a job for {person}.",
    "Find a house in {city}.",
    "Buy me a train ticket to {city}.",
    "When does the train to {city} leave?",
    "Is there a bus to {city}?",
    "Invite {person} to my party.",
    "Record a video.",
    "Scan this document.",
    "Block {person}.",
    "Marry {person} and me.",
    "Which team does {person} play for?",
    "How far away is the moon?",
    "Solve this puzzle for me.",
    "Compare {thing} with {thing}.",
    "Count the words in {title}.",
]
WISHES_ZH = [
    "帮我洗车。",
    "帮我叫一辆出租车去{city_zh}。",
    "给{thing_zh}浇水。",
    "修一下我的{thing_zh}。",
    "帮我理发。",
    "在{city_zh}找一个医生。",
    "在{city_zh}租一辆车。",
    "打扫{thing_zh}。",
    "喂我的{animal_zh}。",
    "画一只{animal_zh}。",
    "画一个{thing_zh}。",
    "打印文件{file}。",
    "删除文件{file}",
    "把门锁上。",
    "打开窗户。",
    "给手机充电。",
    "转账{number}元给{person_zh}。",
    "卖掉我的{thing_zh}。",
    "在{city_zh}找一套房子。",
    "去{city_zh}的火车几点开？",
    "邀请{person_zh}来我家。",
    "给{thing_zh}拍张照。",
    "谁赢了{city_zh}的比赛？",
]
"""What no family can do."""

ATTRIBUTES = listed("""height age weight address price balance rating size color score level capacity speed salary status
birthday job phone size version area rank budget owner length width depth income team title visits profit
member manager limit deadline elevation altitude tax rent fee discount mood""")
"""Things that a subject has, for tools such as get_height(name)."""

SUBJECTS: list[tuple[str, str]] = [
    ("person", "person"),
    ("user", "person"),
    ("customer", "person"),
    ("employee", "person"),
    ("student", "person"),
    ("city", "city"),
    ("company", "company"),
    ("product", "thing"),
    ("book", "title"),
    ("movie", "title"),
    ("account", "code"),
    ("order", "code"),
    ("room", "code"),
    ("car", "code"),
    ("animal", "thing"),
    ("project", "invented"),
]
