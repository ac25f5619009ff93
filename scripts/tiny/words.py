"""Pools of values: names, cities, numbers, dates and invented words, each divided into training and held-out halves.

Knows which values training may see: `is_held_out` decides for every string alike. Knows nothing about sentences.
"""

import random
import zlib
from collections.abc import Callable, Sequence
from typing import TypeVar

Rng = random.Random
T = TypeVar("T")


def listed(text: str) -> list[str]:
    """The words of `text`."""
    return text.split()


def is_held_out(value: str) -> bool:
    """One value in seven is never seen in training and is used by the examination alone."""
    return zlib.crc32(value.encode()) % 7 == 0


class Words:
    """Draws values of a kind; with `held_out`, only values that training never sees."""

    def __init__(self, rng: Rng, held_out: bool = False) -> None:
        self.rng = rng
        self.held_out = held_out

    def draw(self, kind: str) -> str:
        """A value of `kind` as it stands in a sentence: a key of `KINDS`, or "@" and the choices between bars."""
        if kind.startswith("@"):
            return self.one(kind[1:].split("|"))
        make = KINDS[kind]
        for _ in range(1000):
            value = make(self.rng, self.held_out)
            if is_held_out(value) == self.held_out or kind in UNDIVIDED:
                return value
        raise ValueError(f"no {'held-out' if self.held_out else 'training'} value of kind {kind!r}")

    def chance(self, share: float) -> bool:
        """True in `share` of the cases."""
        return self.rng.random() < share

    def one(self, options: Sequence[T]) -> T:
        """One of `options`."""
        return options[int(self.rng.random() * len(options))]


FIRST = listed(
    """Emma Olivia Noah Liam Sophia Lucas Mia Ethan Ava Mason Ella Logan Grace James Lily Henry Zoe Oscar Ruby Felix
    Nora Hugo Clara Leo Alice Max Julia Paul Laura Simon Anna Peter Maria David Sarah Daniel Rachel Adam Rebecca
    Thomas Hannah George Lucy Arthur Elena Victor Sofia Marco Chiara Luca Giulia Pedro Ines Diego Carmen Javier
    Lucia Pablo Marta Ivan Olga Dmitri Irina Sergei Natasha Yuri Katya Boris Vera Raj Priya Arjun Anita Vikram Meera
    Sanjay Kavita Amit Deepa Kenji Yuki Hiro Sakura Takeshi Aiko Haruto Emi Minho Jisoo Hana Sora Omar Layla Hassan
    Fatima Yusuf Amina Karim Leila Kwame Ama Kofi Zuri Tunde Ngozi Sipho Thandi Erik Ingrid Lars Astrid Bjorn Freya
    Sven Maja Anders Linnea Pierre Claire Louis Camille Antoine Margot Klaus Greta Hans Heidi Otto Frieda Bob Tom
    Tim Sam Joe Ben Dan Amy Kate Jane John Mary Mike Linda Steve Karen Brian Nancy Kevin Betty Jason Helen Gary
    Donna Eric Carol Frank Ruth Scott Sharon Carlos Isabel Wendy Gloria Derek Monica Trevor Bianca Nadia Quentin
    Ursula Wesley Yvonne Zachary Abigail Caleb Delia Esther Fiona"""
)

CITIES = listed(
    """Paris London Berlin Madrid Rome Vienna Prague Lisbon Dublin Oslo Stockholm Helsinki Copenhagen Warsaw Budapest
    Athens Brussels Amsterdam Zurich Geneva Munich Hamburg Milan Naples Venice Barcelona Valencia Seville Porto Lyon
    Nice Marseille Bordeaux Tokyo Osaka Kyoto Nagoya Seoul Busan Beijing Shanghai Shenzhen Guangzhou Chengdu Wuhan
    Nanjing Hangzhou Xiamen Taipei Bangkok Hanoi Jakarta Manila Singapore Mumbai Delhi Chennai Kolkata Karachi
    Lahore Dhaka Kabul Tehran Baghdad Cairo Tunis Algiers Casablanca Lagos Accra Nairobi Kampala Dakar Luanda Harare
    Pretoria Durban Sydney Melbourne Brisbane Perth Adelaide Auckland Wellington Toronto Montreal Vancouver Ottawa
    Calgary Boston Chicago Seattle Denver Dallas Houston Austin Miami Atlanta Phoenix Portland Detroit Memphis
    Orlando Havana Bogota Lima Quito Santiago Brasilia Recife Salvador Montevideo Caracas Panama Moscow Kazan Kiev
    Minsk Riga Tallinn Vilnius Sofia Belgrade Zagreb Sarajevo Istanbul Ankara Izmir Doha Dubai Muscat Riyadh Amman
    Beirut Jerusalem Reykjavik Edinburgh Glasgow Cardiff Leeds Bristol York Oxford Cambridge Liverpool Manchester
    Florence Turin Bologna Granada Malaga Bilbao Ghent Antwerp Cologne Dresden Leipzig Salzburg Graz Krakow Gdansk
    Lodz Tampa Nashville Baltimore Cleveland Oakland Sacramento"""
)
CITIES += ["New York", "Los Angeles", "San Francisco", "Hong Kong", "Buenos Aires", "Cape Town", "Mexico City"]
CITIES += [
    "New Delhi",
    "Tel Aviv",
    "Las Vegas",
    "San Diego",
    "Kuala Lumpur",
    "Abu Dhabi",
    "Salt Lake City",
    "Rio de Janeiro",
]

CITIES_ZH = listed(
    """北京 上海 广州 深圳 成都 重庆 武汉 南京 杭州 西安 苏州 天津 青岛 大连 厦门 长沙 郑州 济南 沈阳
    哈尔滨 长春 昆明 贵阳 南宁 海口 福州 南昌 合肥 太原 石家庄 兰州 西宁 银川 拉萨 宁波 温州 无锡 常州
    扬州 桂林 三亚 珠海 东莞 佛山 洛阳 开封 大理 丽江 香港 澳门 台北 东京 大阪 首尔 曼谷 巴黎 伦敦 柏林
    罗马 马德里 纽约 芝加哥 波士顿 悉尼 墨尔本 莫斯科 开罗 多伦多"""
)
SURNAMES_ZH = "王李张刘陈杨黄赵周吴徐孙马朱胡林郭何高罗郑梁谢宋唐许邓冯韩曹"
GIVEN_ZH = "明华丽伟芳娜敏静强磊军洋勇艳杰娟涛超霞平刚桂英文辉玲红玉兰雪梅晨宇浩欣怡婷佳琪睿博思雨子轩梓涵一诺天海云峰"

NOUNS = listed(
    """apple river stone cloud garden window bottle pencil mirror candle basket ladder hammer pillow blanket guitar
    violin piano camera lantern ticket wallet jacket helmet rocket tractor bicycle kettle teapot spoon bucket carpet
    curtain engine saddle anchor compass feather pebble meadow forest valley island desert harbor castle tower
    bridge tunnel market bakery library museum theater school kitchen cellar attic balcony fountain statue parcel
    letter diary novel poem recipe sandwich pancake noodle carrot tomato onion pepper lemon cherry banana orange
    grape melon peach walnut almond honey butter cheese coffee tea milk bread rice soup salad pizza pasta cookie
    chocolate tiger lion zebra rabbit turtle dolphin eagle sparrow penguin monkey elephant giraffe camel donkey
    horse sheep goat chicken turkey lobster salmon spider butterfly dragon"""
)
ADJECTIVES = listed(
    """red blue green yellow purple orange brown black white grey pink silver golden small large tiny huge quick slow
    quiet loud bright dark warm cold soft hard new old young fresh dry wet clean round square flat deep tall short
    happy"""
)
ANIMALS = listed(
    """cat dog rabbit parrot hamster turtle horse goldfish lizard pony duck goat snake ferret canary mouse"""
)
COLORS = listed(
    """red blue green yellow purple orange brown black white grey pink silver gold teal violet maroon navy olive"""
)
FOODS = listed(
    """pizza sushi pasta noodles dumplings tacos curry salad soup rice bread cheese chocolate pancakes steak ramen"""
)
COMPANIES = listed(
    """Apple Google Amazon Tesla Intel Nvidia Baidu Tencent Alibaba Huawei Sony Toyota Honda Samsung Nokia Siemens
    Bosch Volvo Ikea Nestle Adidas Puma Nike Disney Netflix Oracle Adobe Cisco Boeing Airbus Pfizer Bayer Shell Visa
    Xiaomi"""
)
LANGUAGES = listed(
    """French German Spanish Italian Chinese Japanese Korean
    Russian Arabic Hindi Portuguese Dutch Greek Turkish Polish"""
)
CURRENCIES = listed("USD EUR GBP JPY CNY CHF CAD AUD INR KRW BRL MXN SEK NOK SGD HKD")
DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday today tomorrow tonight")
MONTHS = listed("January February March April May June July August September October November December")
WEATHER = listed("sunny cloudy rainy windy foggy snowy stormy clear hazy dry")
WEATHER_ZH = listed("晴 多云 小雨 大雨 有风 有雾 下雪 阴")
NOUNS_ZH = listed(
    "苹果 咖啡 面条 雨伞 手机 电脑 自行车 钢琴 相机 书包 牛奶 面包 米饭 西瓜 茶叶 地图 信件 帽子 台灯 风筝 花瓶 钥匙"
)
COLORS_ZH = listed("红色 蓝色 绿色 黄色 紫色 橙色 黑色 白色 粉色 灰色")
ANIMALS_ZH = listed("猫 狗 兔子 鹦鹉 仓鼠 乌龟 马 金鱼 鸭子 山羊")

HANZI = "".join(dict.fromkeys("".join(CITIES_ZH + NOUNS_ZH) + SURNAMES_ZH + GIVEN_ZH))
HANZI += "".join(
    dict.fromkeys(
        c
        for c in """的一是了我不在有他这个们来到时大地为子中你说生年着就那出要也得里后自以会家可下过能对小多心开好学当
        起想看只用方又如前所本见经头面公同三已老从动两长知样现分将外但身些与高意进把法此实回二理美点月明其声全工己话儿
        者向情部正名定女问力机给等几很业最间新什打便位因重被走电四第门相次东政海口使教西再平真听世气信北少关并内加"""
        if c > " " and c not in HANZI
    )
)
"""Characters that Chinese words of no meaning are made of: all those of the pools, and common ones."""

ONSETS = listed("b c d f g h j k l m n p r s t v w z br cl dr fl gr kl kr pl pr sh sk sl sn st tr th ch qu")
VOWELS = listed("a e i o u a e i o u ai ea ee oo ou ia io")
CODAS = ["", "", "", "n", "r", "l", "s", "t", "m", "k", "d", "x", "nd", "rt", "st", "lm", "rn", "ck", "sh", "ng"]


def invented(rng: Rng, syllables: tuple[int, ...] = (1, 2, 2, 2, 3)) -> str:
    """A word of no language, such as "sanvor"; sometimes the head of one real word and the tail of another."""
    count = rng.choice(syllables)
    if count > 1 and rng.random() < 0.3:
        head, tail = rng.choice(PARTS), rng.choice(PARTS)
        return head[: rng.randint(2, max(2, len(head) - 2))] + tail[rng.randint(1, max(1, len(tail) - 2)) :]
    middle = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(count - 1))
    return middle + rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)


PARTS = [w.lower() for w in FIRST + CITIES + COMPANIES + NOUNS if w.isalpha() and len(w) > 3]


def invented_zh(rng: Rng) -> str:
    """One to three Chinese characters in a row that mean nothing."""
    return "".join(rng.choice(HANZI) for _ in range(rng.choice((1, 2, 2, 2, 3))))


def _number(rng: Rng, largest_digits: int = 4) -> str:
    digits = rng.randint(1, largest_digits)
    return str(rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1))


def _real_or_invented(pool: list[str], share: float = 0.55) -> Callable[[Rng, bool], str]:
    def make(rng: Rng, held_out: bool) -> str:
        return rng.choice(pool) if rng.random() < (0.85 if held_out else share) else invented(rng).capitalize()

    return make


def _real_or_invented_zh(pool: list[str]) -> Callable[[Rng, bool], str]:
    def make(rng: Rng, held_out: bool) -> str:
        return rng.choice(pool) if rng.random() < (0.85 if held_out else 0.5) else invented_zh(rng)

    return make


def _person_zh(rng: Rng, held_out: bool) -> str:
    if not held_out and rng.random() < 0.2:
        return rng.choice(SURNAMES_ZH) + invented_zh(rng)
    if rng.random() < 0.06:  # characters outside the vocabulary, which are copied byte by byte
        return rng.choice(SURNAMES_ZH) + chr(rng.randint(0x4E00, 0x9FA0))
    return rng.choice(SURNAMES_ZH) + "".join(rng.choice(GIVEN_ZH) for _ in range(rng.choice((1, 2, 2))))


def _full_name(rng: Rng, held_out: bool) -> str:
    if rng.random() < 0.08:
        return invented(rng, (2,)).capitalize() + rng.choice("éèüöäñçøåß") + invented(rng, (1,))
    return rng.choice(FIRST) + " " + invented(rng, (2,)).capitalize()


def _title(rng: Rng, _: bool) -> str:
    return f"{rng.choice(ADJECTIVES).capitalize()} {rng.choice(NOUNS).capitalize()}"


def _text(rng: Rng, _: bool) -> str:
    shape = rng.randrange(5)
    if shape == 0:
        return f"buy {rng.choice(NOUNS)} and {rng.choice(NOUNS)}"
    if shape == 1:
        return f"the {rng.choice(NOUNS)} is {rng.choice(ADJECTIVES)}"
    if shape == 2:
        return f"call {rng.choice(FIRST)} at {_clock(rng, False)}"
    if shape == 3:
        return f"see you at the {rng.choice(NOUNS)}"
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {invented(rng)}"


def _clock(rng: Rng, _: bool) -> str:
    return f"{rng.randint(0, 23)}:{rng.randint(0, 59):02d}"


def _date(rng: Rng, _: bool) -> str:
    if rng.random() < 0.5:
        return f"{rng.randint(2019, 2031)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
    return f"{rng.choice(MONTHS)} {rng.randint(1, 28)}"


def _code(rng: Rng, _: bool) -> str:
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    return f"{letters}{rng.choice(['', '-'])}{rng.randint(10, 99999)}"


def _email(rng: Rng, _: bool) -> str:
    user = rng.choice([invented(rng), rng.choice(FIRST).lower()])
    return f"{user}@{invented(rng)}.{rng.choice(['com', 'org', 'net', 'cn'])}"


def _file(rng: Rng, _: bool) -> str:
    folder = rng.choice(["", "", invented(rng) + "/"])
    return f"{folder}{rng.choice([invented(rng), rng.choice(NOUNS)])}.{rng.choice(['txt', 'md', 'py', 'csv', 'json'])}"


KINDS: dict[str, Callable[[Rng, bool], str]] = {
    "city": _real_or_invented(CITIES),
    "person": _real_or_invented(FIRST),
    "full_name": _full_name,
    "company": _real_or_invented(COMPANIES),
    "city_zh": _real_or_invented_zh(CITIES_ZH),
    "person_zh": _person_zh,
    "thing": lambda rng, _: rng.choice(NOUNS) if rng.random() < 0.6 else invented(rng),
    "thing_zh": _real_or_invented_zh(NOUNS_ZH),
    "title": _title,
    "text": _text,
    "number": lambda rng, _: _number(rng),
    "small": lambda rng, _: str(rng.randint(2, 99)),
    "decimal": lambda rng, _: f"{_number(rng, 3)}.{rng.randint(1, 9)}",
    "clock": _clock,
    "date": _date,
    "code": _code,
    "email": _email,
    "file": _file,
    "invented": lambda rng, _: invented(rng),
    "invented_zh": lambda rng, _: invented_zh(rng),
    "language": lambda rng, _: rng.choice(LANGUAGES),
    "currency": lambda rng, _: rng.choice(CURRENCIES),
    "day": lambda rng, _: rng.choice(DAYS),
    "animal": lambda rng, _: rng.choice(ANIMALS),
    "color": lambda rng, _: rng.choice(COLORS),
    "food": lambda rng, _: rng.choice(FOODS),
    "weather": lambda rng, _: rng.choice(WEATHER),
    "weather_zh": lambda rng, _: rng.choice(WEATHER_ZH),
    "animal_zh": lambda rng, _: rng.choice(ANIMALS_ZH),
    "color_zh": lambda rng, _: rng.choice(COLORS_ZH),
    "unit": lambda rng, _: rng.choice(["celsius", "fahrenheit"]),
}
UNDIVIDED = {
    "language",
    "currency",
    "day",
    "animal",
    "color",
    "food",
    "weather",
    "unit",
    "weather_zh",
    "animal_zh",
    "color_zh",
}
"""Kinds too small to divide: everybody sees all of them."""
