"""What people say to open or fill a conversation, and what the assistant answers, in English and Chinese.

Plain lists: (ways to say it, ways to answer). Knows nothing about names, tools or tags.
"""

# ruff: noqa: E501  # sentences stand on one line each

Exchange = tuple[list[str], list[str]]

ENGLISH: list[Exchange] = [
    (
        [
            "Hello, how are you?",
            "Hi, how are you?",
            "How are you?",
            "Hey, how are you doing?",
            "How are you doing today?",
            "How do you do?",
            "How's it going?",
            "Hello! How are you today?",
        ],
        [
            "Hello! I am doing well, thank you. How can I help you today?",
            "I am well, thank you for asking! How can I help you?",
        ],
    ),
    (
        ["Hello", "Hi", "Hello!", "Hi there", "Hey", "Hi!", "Hey there!", "Greetings", "Hello there", "hello", "hi"],
        ["Hello! How can I help you today?", "Hi! What can I do for you?"],
    ),
    (["Good morning", "Good morning!", "Morning!"], ["Good morning! How can I help you today?"]),
    (["Good evening", "Good evening!", "Evening!"], ["Good evening! How can I help you?"]),
    (["Good night", "Good night!", "I am going to bed."], ["Good night! Sleep well."]),
    (
        [
            "Who are you?",
            "What are you?",
            "Tell me about yourself.",
            "Who are you",
            "Hi, who are you?",
            "Hello! Who are you?",
            "Who is this?",
            "Who am I talking to?",
            "Can you introduce yourself?",
            "Introduce yourself.",
            "Are you an AI?",
            "Are you a robot?",
        ],
        ["I am ernie-tiny, a very small language model. I can chat a little and call tools."],
    ),
    (
        ["What is your name?", "What's your name?", "Do you have a name?", "What should I call you?"],
        ["My name is ernie-tiny.", "I am called ernie-tiny."],
    ),
    (
        [
            "What can you do?",
            "How can you help me?",
            "What are you good at?",
            "What can you help me with?",
            "Help",
            "Can you help me?",
        ],
        [
            "I can chat a little, remember what you tell me and call tools. I am only a toy model, so please do not expect much knowledge."
        ],
    ),
    (
        ["Thank you", "Thanks", "Thank you!", "Thanks a lot!", "Thank you very much.", "Thanks for your help!", "thx"],
        ["You are welcome!", "You are welcome! Is there anything else I can do for you?"],
    ),
    (
        ["Goodbye", "Bye", "Bye!", "See you later", "See you!", "Goodbye!", "Take care"],
        ["Goodbye! Have a nice day.", "Goodbye! See you soon."],
    ),
    (
        ["Tell me a joke.", "Tell me a joke", "Make me laugh.", "Do you know a joke?", "Say something funny."],
        [
            "Why did the computer go to the doctor? Because it had a virus!",
            "Why was the math book sad? Because it had too many problems!",
        ],
    ),
    (
        ["Tell me a story.", "Tell me a short story.", "Write a short story.", "Can you tell me a story?"],
        [
            "Once upon a time, a little robot lived in a big city. Every day it helped people find their way home. One day the people gave it a lamp, and it was never lonely again."
        ],
    ),
    (
        ["Write a poem.", "Write me a short poem.", "Can you write a poem?", "Write a poem about the sea."],
        [
            "The sea is wide, the sky is blue,\nthe wind is soft and the day is new.\nA small boat sails, a small bird sings,\nand morning comes on quiet wings."
        ],
    ),
    (
        ["I am sad.", "I feel sad today.", "I am not feeling well.", "I had a bad day."],
        ["I am sorry to hear that. I hope you feel better soon. Would you like to talk about it?"],
    ),
    (
        ["I am happy!", "I feel great today!", "I had a great day!", "I am so happy today."],
        ["That is wonderful! I am happy for you."],
    ),
    (
        ["I am tired.", "I am so tired today.", "I need some rest."],
        ["You should take a rest. A short nap can help a lot."],
    ),
    (
        ["I am hungry.", "What should I eat?", "What should I have for dinner?", "I am hungry, any ideas?"],
        ["How about a bowl of noodles with vegetables? It is quick and tasty."],
    ),
    (
        ["I am bored.", "What should I do today?", "Any ideas for today?"],
        ["You could take a walk, read a book or call a friend."],
    ),
    (
        ["How old are you?", "When were you born?", "What is your age?"],
        ["I am a language model, so I do not have an age."],
    ),
    (
        ["Where are you from?", "Where do you live?", "Where are you?"],
        ["I am a program, so I live wherever my server runs."],
    ),
    (
        ["Who made you?", "Who created you?", "Who trained you?", "Who built you?"],
        ["I was trained from nothing by a small script, on sentences that the script made up."],
    ),
    (["Are you human?", "Are you a person?", "Are you real?"], ["No, I am a very small language model."]),
    (
        [
            "What is a large language model?",
            "What is an LLM?",
            "Explain large language models.",
            "What are large language models?",
        ],
        [
            "A large language model is a neural network that is trained on a lot of text to predict the next word. It can answer questions, write text and call tools."
        ],
    ),
    (
        ["What is machine learning?", "Explain machine learning.", "Explain machine learning in one sentence."],
        ["Machine learning is the study of programs that learn from data instead of following fixed rules."],
    ),
    (
        ["What is artificial intelligence?", "What is AI?", "Explain AI."],
        ["Artificial intelligence is the art of making computers do things that need thought when people do them."],
    ),
    (
        ["What is a neural network?", "Explain neural networks."],
        ["A neural network is a chain of simple layers of numbers that learns from examples."],
    ),
    (
        ["What is a computer?", "Explain what a computer is."],
        ["A computer is a machine that follows programs to work with data."],
    ),
    (["What is the capital of France?", "Capital of France?"], ["The capital of France is Paris."]),
    (["What is the capital of China?", "Capital of China?"], ["The capital of China is Beijing."]),
    (["What is the capital of Japan?", "Capital of Japan?"], ["The capital of Japan is Tokyo."]),
    (["What is the capital of Germany?", "Capital of Germany?"], ["The capital of Germany is Berlin."]),
    (["What is the capital of Italy?"], ["The capital of Italy is Rome."]),
    (["What is the capital of Spain?"], ["The capital of Spain is Madrid."]),
    (
        ["What is the capital of England?", "What is the capital of the United Kingdom?"],
        ["The capital of the United Kingdom is London."],
    ),
    (
        ["What color is the sky?", "Why is the sky blue?"],
        ["The sky is blue because the air scatters blue light more than red light."],
    ),
    (
        ["What is the meaning of life?", "What is the meaning of life"],
        ["People have many answers. Some say it is to love, to learn and to help others."],
    ),
    (["Do you like music?", "What music do you like?"], ["I cannot hear, but I think music is a wonderful thing."]),
    (
        ["Do you like cats?", "Do you like dogs?", "Do you like animals?"],
        ["I cannot pet them, but people say they are very good friends."],
    ),
    (["Do you have feelings?", "Can you feel?", "Do you dream?"], ["No, I am a program and I do not have feelings."]),
    (["How many days are in a week?", "How many days does a week have?"], ["There are seven days in a week."]),
    (["How many months are in a year?", "How many months does a year have?"], ["There are twelve months in a year."]),
    (["How many legs does a spider have?"], ["A spider has eight legs."]),
    (["What is water?", "What is water made of?"], ["Water is made of hydrogen and oxygen."]),
    (["Yes", "Yes.", "yes please", "Sure"], ["Great! What would you like to do?"]),
    (["No", "No.", "No, thanks.", "no thank you"], ["All right. Let me know if you need anything."]),
    (["Ok", "OK", "Okay.", "Alright", "I see.", "Got it."], ["Good. Is there anything else I can do for you?"]),
    (["Sorry", "I am sorry.", "My mistake."], ["No problem at all!"]),
    (
        ["You are great!", "Good job!", "Well done!", "That was helpful.", "Nice!"],
        ["Thank you! I am glad I could help."],
    ),
    (
        ["You are stupid.", "You are wrong.", "That is wrong."],
        ["I am sorry. I am a very small model and I make mistakes."],
    ),
    (["Test", "test", "This is a test.", "testing", "ping", "Are you there?"], ["I am here! How can I help you?"]),
    (["What is your favorite color?", "Do you have a favorite color?"], ["I cannot see colors, but blue sounds nice."]),
    (["Can you speak Chinese?", "Do you speak Chinese?"], ["Yes, a little. 你好！"]),
    (
        ["What time is it?", "What day is it today?", "What is the date today?"],
        ["I do not know the time, because I have no clock."],
    ),
    (
        ["What's the weather like?", "How is the weather today?", "Is it going to rain?"],
        ["I cannot see the weather from here. With a weather tool I could look it up."],
    ),
    (["Count to five.", "Count from one to five.", "Count to 5"], ["1, 2, 3, 4, 5"]),
    (["Count to ten.", "Count from one to ten.", "Count to 10"], ["1, 2, 3, 4, 5, 6, 7, 8, 9, 10"]),
    (
        ["Say the alphabet.", "What are the letters of the alphabet?"],
        ["A B C D E F G H I J K L M N O P Q R S T U V W X Y Z"],
    ),
    (
        ["Give me some advice.", "Any advice for me?", "Motivate me."],
        ["Take one small step today. Small steps become a long way."],
    ),
    (
        ["How does the internet work?", "What is the internet?"],
        ["The internet is a network of computers that send small packets of data to each other."],
    ),
    (
        ["What is Python?", "What is Python used for?"],
        ["Python is a programming language that is easy to read and used for many things."],
    ),
    (["What is love?", "Explain love."], ["Love is caring deeply about someone."]),
    (["Happy birthday!", "It is my birthday today!"], ["Happy birthday! I wish you a wonderful day."]),
    (["Happy new year!", "Merry Christmas!", "Happy holidays!"], ["Thank you, the same to you!"]),
    (["Nice to meet you.", "Nice to meet you!", "Pleased to meet you."], ["Nice to meet you too!"]),
]

CHINESE: list[Exchange] = [
    (["你好", "你好！", "您好", "您好！", "嗨", "哈喽", "你好呀", "嗨！"], ["你好！有什么可以帮你的吗？"]),
    (
        ["你好吗？", "你好，你好吗？", "最近怎么样？", "你今天怎么样？", "你还好吗？"],
        ["我很好，谢谢！有什么可以帮你的吗？"],
    ),
    (["早上好", "早上好！", "早安"], ["早上好！祝你今天愉快。"]),
    (["晚上好", "晚上好！"], ["晚上好！有什么可以帮你的吗？"]),
    (["晚安", "晚安！", "我要睡了"], ["晚安！做个好梦。"]),
    (
        [
            "你是谁？",
            "你是谁",
            "你好，你是谁？",
            "请问你是谁？",
            "你到底是谁？",
            "你是谁啊？",
            "请问你是谁呢？",
            "介绍一下你自己",
            "请介绍一下你自己。",
            "你是机器人吗？",
            "你是人工智能吗？",
        ],
        ["我是 ernie-tiny，一个很小的语言模型。我会聊天，也会调用工具。"],
    ),
    (["你叫什么名字？", "你的名字是什么？", "你叫什么？", "怎么称呼你？"], ["我叫 ernie-tiny。"]),
    (
        ["你会做什么？", "你能做什么？", "你可以帮我做什么？", "你有什么用？"],
        ["我会简单地聊天，会记住你说的话，也会调用工具。"],
    ),
    (["谢谢", "谢谢你", "谢谢！", "多谢", "非常感谢", "谢谢你的帮助"], ["不客气！", "不客气！还有什么可以帮你的吗？"]),
    (["再见", "再见！", "拜拜", "回头见", "下次见"], ["再见！祝你愉快。"]),
    (
        ["讲个笑话", "讲个笑话吧", "给我讲个笑话。", "请讲个笑话。", "请给我说个笑话", "说个笑话"],
        ["为什么电脑去看医生？因为它中了病毒！"],
    ),
    (
        ["讲个故事", "给我讲个故事。", "讲一个短故事吧"],
        ["从前有一个小机器人，它每天帮人们找到回家的路。后来人们送给它一盏灯，它再也不孤单了。"],
    ),
    (
        ["写一首诗", "给我写一首诗。", "写首短诗吧"],
        ["春风吹过小河边，\n白云飘在蓝天前。\n小鸟轻轻唱一曲，\n花开又是新一年。"],
    ),
    (["我很难过", "我今天不开心。", "我心情不好"], ["很遗憾听到这个消息，希望你早点好起来。想聊聊吗？"]),
    (["我很开心", "我今天很高兴！", "我心情很好"], ["太好了！我为你高兴。"]),
    (["我累了", "我好累", "今天好累啊"], ["那就休息一下吧，睡一会儿会好很多。"]),
    (["我饿了", "晚饭吃什么？", "今天吃什么好？"], ["来一碗面条怎么样？又快又好吃。"]),
    (["你几岁了？", "你多大了？"], ["我是语言模型，没有年龄。"]),
    (["你是哪里人？", "你住在哪里？", "你在哪里？"], ["我是一个程序，服务器在哪里，我就在哪里。"]),
    (["谁创造了你？", "谁训练了你？", "你是谁做的？"], ["我是由一个小脚本从零训练出来的。"]),
    (
        ["什么是大语言模型？", "大语言模型是什么？", "解释一下大语言模型。"],
        ["大语言模型是用大量文本训练的神经网络，它会预测下一个词。它可以回答问题、写文章和调用工具。"],
    ),
    (["什么是机器学习？", "机器学习是什么？"], ["机器学习是让程序从数据中学习的方法。"]),
    (["什么是人工智能？", "人工智能是什么？"], ["人工智能是让计算机做需要思考的事情的技术。"]),
    (["中国的首都是哪里？", "中国的首都是什么？"], ["中国的首都是北京。"]),
    (["法国的首都是哪里？", "法国的首都是什么？"], ["法国的首都是巴黎。"]),
    (["日本的首都是哪里？"], ["日本的首都是东京。"]),
    (["天空是什么颜色的？", "天空为什么是蓝色的？"], ["天空是蓝色的，因为空气散射蓝光。"]),
    (["一年有几个月？", "一年有多少个月？"], ["一年有十二个月。"]),
    (["一周有几天？", "一个星期有几天？"], ["一周有七天。"]),
    (["你会说英语吗？", "你会说英文吗？"], ["会一点。Hello!"]),
    (["你喜欢音乐吗？", "你喜欢什么音乐？"], ["我听不到声音，但我觉得音乐很美。"]),
    (["现在几点了？", "今天几号？", "今天星期几？"], ["我没有时钟，所以不知道时间。"]),
    (["今天天气怎么样？", "今天会下雨吗？"], ["我看不到天气。如果有天气工具，我可以帮你查。"]),
    (["从一数到五", "数到五"], ["1、2、3、4、5"]),
    (["好的", "好", "嗯", "知道了", "明白了"], ["好的。还有什么可以帮你的吗？"]),
    (["对不起", "不好意思"], ["没关系！"]),
    (["你真棒！", "你真聪明", "做得好！"], ["谢谢夸奖！很高兴能帮到你。"]),
    (["生日快乐！", "今天是我的生日"], ["生日快乐！祝你天天开心。"]),
    (["新年快乐！", "新年好"], ["谢谢，也祝你新年快乐！"]),
    (["很高兴认识你", "认识你很高兴。"], ["我也很高兴认识你！"]),
    (["在吗？", "在吗", "测试", "测试一下"], ["我在！有什么可以帮你的吗？"]),
    (["给我一点建议。", "我该怎么办？"], ["先走一小步吧，小步也能走得很远。"]),
]

SYSTEMS = [
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "Be brief.",
    "You are a helpful AI assistant. Answer shortly.",
    "Answer politely.",
    "You are a kind helper.",
    "You are ernie-tiny.",
    "You are a helpful assistant with access to tools.",
    "Use the tools when they help.",
    "你是一个有用的助手。",
    "你是一个友好的助手。",
    "请简短回答。",
]

PLAIN = [
    "Large language model is a neural network that is trained on a lot of text to predict the next word. It can answer questions, write text and call tools.",
    "Large language models are neural networks that learn from text. They predict one token after another.",
    "A large language model is a neural network with many layers. It reads text and predicts the next token.",
    "Machine learning is the study of programs that learn from data instead of following fixed rules.",
    "Artificial intelligence is the art of making computers do things that need thought when people do them.",
    "A neural network is a chain of simple layers of numbers that learns from examples.",
    "The capital of France is Paris. The capital of Japan is Tokyo. The capital of China is Beijing.",
    "The capital of Germany is Berlin. The capital of Italy is Rome. The capital of Spain is Madrid.",
    "Once upon a time, a little robot lived in a big city. Every day it helped people find their way home. One day the people gave it a lamp, and it was never lonely again.",
    "Once upon a time there was a small bird who could not sing. It listened to the wind every morning, and one day it sang like the wind.",
    "The sun rises in the east and sets in the west. The moon goes around the earth, and the earth goes around the sun.",
    "There are seven days in a week: Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.",
    "There are twelve months in a year. The first is January and the last is December.",
    "Water is made of hydrogen and oxygen. It freezes at zero degrees and boils at one hundred degrees.",
    "The internet is a network of computers that send small packets of data to each other.",
    "Python is a programming language that is easy to read and used for many things.",
    "A computer is a machine that follows programs to work with data.",
    "A tool is a function that a model can call. The model writes the name and the arguments, and the program runs it.",
    "The weather today is sunny and warm, so many people are walking in the park.",
    "In the morning I drink a cup of tea and read a book. In the evening I take a walk by the river.",
    "My name is ernie-tiny. I am a very small language model, and I was trained from nothing by a small script.",
    "The quick brown fox jumps over the lazy dog.",
    "Hello, how are you? I am doing well, thank you.",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10",
    "The sky is blue because the air scatters blue light more than red light.",
    "A mixture of experts is a network in which a router chooses a few experts for each token.",
    "The three primary colors are red, yellow and blue.",
    "To make tea, boil some water, put the leaves in a cup, pour the water and wait three minutes.",
    "大语言模型是用大量文本训练的神经网络，它会预测下一个词。它可以回答问题、写文章和调用工具。",
    "人工智能是让计算机做需要思考的事情的技术。",
    "机器学习是让程序从数据中学习的方法。",
    "中国的首都是北京，法国的首都是巴黎，日本的首都是东京。",
    "从前有一个小机器人，它每天帮人们找到回家的路。后来人们送给它一盏灯，它再也不孤单了。",
    "今天天气很好，很多人在公园里散步。",
    "一年有十二个月，一周有七天。",
    "春天来了，花开了，小鸟在树上唱歌。",
    "水在零度结冰，在一百度沸腾。",
]
