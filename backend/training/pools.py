"""Names, places and things, and made-up ones: what is drawn from must be far too much to learn by
heart, so that the model learns to copy."""

from __future__ import annotations

from random import Random

from training.dialogue import reserved

FIRST = (
    "Ada Alan Alice Amir Amina Anna Anton Aisha Ben Bea Boris Carla Carlos Chen Chloe Clara Daniel "
    "Daria David Diego Dora Edith Elena Elif Emil Emma Eric Esther Eva Farid Fatima Felix Fiona "
    "Frank Freya George Grace Greta Gustav Hana Hassan Hannah Hugo Ida Igor Ines Irene Ivan Ivy "
    "Jack Jana Jin Joan Jonas Julia Kai Karim Kate Kenji Kira Lars Laura Lea Leon Lena Liam Lina "
    "Lucas Lucy Luis Mara Marco Maria Mark Marta Maya Mei Mia Milan Mina Mohamed Nadia Nina Noah "
    "Nora Olga Oliver Omar Oscar Otto Paul Paula Pedro Petra Priya Quinn Rania Ravi Rita Robert "
    "Rosa Ruth Sam Sana Sara Sofia Stefan Sven Tara Theo Thomas Tim Tina Tom Uma Ursula Vera "
    "Victor Wanda Will Xenia Yara Yuki Yusuf Zara Zoe"
).split()
LAST = (
    "Adams Baker Becker Bell Berg Brown Carter Chen Clark Cohen Costa Cruz Davis Diaz Dubois Evans "
    "Fischer Flores Ford Garcia Gomez Gray Green Haddad Hall Hansen Hill Hoffman Ito Jansen Jones "
    "Kaya Keller Khan Kim King Klein Kowalski Kumar Larsen Lee Lewis Lopez Martin Meyer Mills "
    "Moore Mori Morris Nagy Nguyen Novak Olsen Ortiz Park Patel Perez Popov Price Reed Reyes Rossi "
    "Sato Schmidt Scott Silva Singh Smith Stone Suzuki Tanaka Taylor Torres Turner Vega Walker "
    "Wang Weber White Wolf Wong Wood Wright Yilmaz Young Zhang"
).split()
CITIES = (
    "Accra Amsterdam Ankara Athens Auckland Bangkok Barcelona Basel Beirut Bergen Berlin Bogota "
    "Boston Brussels Budapest Cairo Chicago Cologne Cork Dakar Delhi Denver Dublin Dubai Florence "
    "Geneva Ghent Glasgow Graz Hamburg Hanoi Havana Helsinki Houston Istanbul Jakarta Kyoto Lagos "
    "Leeds Lima Lisbon London Lyon Madrid Malmo Manila Marseille Melbourne Miami Milan Montreal "
    "Moscow Mumbai Munich Nairobi Naples Nice Osaka Oslo Ottawa Paris Perth Porto Prague Quito "
    "Riga Rome Rotterdam Salzburg Santiago Seattle Seoul Seville Shanghai Singapore Sofia Stockholm "
    "Sydney Tallinn Tokyo Toronto Tunis Turin Utrecht Valencia Venice Vienna Vilnius Warsaw Zurich"
).split()
COUNTRIES = (
    "Argentina Austria Belgium Brazil Canada Chile China Denmark Egypt Finland France Germany Ghana "
    "Greece Hungary Iceland India Ireland Italy Japan Kenya Mexico Morocco Norway Peru Poland "
    "Portugal Spain Sweden Turkey Vietnam"
).split()
JOBS = (
    "actor architect baker barber biologist carpenter chemist cook dancer dentist designer doctor "
    "driver editor engineer farmer gardener judge lawyer librarian mechanic musician nurse painter "
    "pilot plumber poet programmer sailor singer tailor teacher translator waiter writer"
).split()
COLOURS = (
    "red blue green yellow orange purple pink brown black white grey silver gold violet teal beige"
).split()
ANIMALS = (
    "cat dog horse rabbit parrot hamster goat sheep cow duck goose turtle snake lizard pony donkey "
    "ferret mouse owl fox"
).split()
THINGS = (
    "apple bag ball bench bike blanket book bottle bowl box brush bucket cake camera candle chair "
    "clock coat cup desk door drum fan flute fork glass glove guitar hammer hat jacket jar kettle "
    "key knife ladder lamp lemon map mirror mug needle oven paper pear pen pencil phone piano plate "
    "radio ring rope ruler scarf shelf shirt shoe sofa spoon stove table tent ticket towel toy "
    "umbrella vase violin wallet watch wheel"
).split()
FOODS = (
    "bread butter cheese coffee eggs flour honey juice milk noodles oil onions pasta pepper rice "
    "salad salt soup sugar tea tomatoes beans carrots fish grapes melons mushrooms nuts olives"
).split()
LANGUAGES = "English French German Spanish Italian Turkish Japanese Arabic Hindi Polish".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()

_STARTS = "b br c ch d dr f fl g gr h j k kl l m n p pl qu r s sh sk st t tr v w z".split()
_MIDDLES = "a e i o u ai ea ee io oa ou".split()
_ENDS = "b ck d g k l ll m n nd ng p r rk s sh st t th x".split()


def made_word(random: Random) -> str:
    """Pronounceable, and never read before."""
    syllables = random.choice((1, 2, 2, 3))
    parts = [random.choice(_STARTS) + random.choice(_MIDDLES) for _ in range(syllables)]
    return "".join(parts) + random.choice(("", random.choice(_ENDS)))


def code(random: Random) -> str:
    letters = "".join(
        random.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(random.choice((2, 3)))
    )
    return f"{letters}-{random.randrange(10, 10 ** random.choice((3, 4, 5)))}"


def full_name(random: Random) -> str:
    return f"{first(random)} {random.choice((random.choice(LAST), made_word(random).title()))}"


def first(random: Random) -> str:
    return random.choice(FIRST) if random.random() < 0.7 else made_word(random).title()


def city(random: Random) -> str:
    return random.choice(CITIES) if random.random() < 0.75 else made_word(random).title()


def date(random: Random) -> str:
    year, month, day = random.randint(1950, 2035), random.randint(1, 12), random.randint(1, 28)
    return f"{year}-{month:02}-{day:02}"


def clock(random: Random) -> str:
    return f"{random.randrange(24):02}:{random.choice((0, 10, 15, 20, 30, 40, 45, 50)):02}"


def email(random: Random) -> str:
    user = random.choice((made_word(random), random.choice(FIRST).lower()))
    end = random.choice(("com", "org", "net", "io"))
    return f"{user}{random.choice(('', str(random.randrange(100))))}@{made_word(random)}.{end}"


def file_path(random: Random) -> str:
    folders = [made_word(random) for _ in range(random.choice((0, 1, 1, 2)))]
    name = random.choice((made_word(random), random.choice(THINGS)))
    end = random.choice(("txt", "csv", "json", "md", "py", "log", "png"))
    return random.choice(("", "/", "./")) + "/".join([*folders, f"{name}.{end}"])


def price(random: Random) -> float:
    return random.randrange(1, 400) + random.choice((0.25, 0.5, 0.75, 0.95, 0.99, 0.05))


def keep(value: object, want_reserved: bool) -> bool:
    """Whether a value may be used here: reserved ones only where they are asked for."""
    return reserved("value", value) == want_reserved


def draw(make: object, random: Random, held_out: bool) -> str:
    """A string from `make(random)` of the right side of the line."""
    assert callable(make)
    for _ in range(400):
        value: str = make(random)
        if keep(value, held_out):
            return value
    raise ValueError(f"no value of {make} on this side")
