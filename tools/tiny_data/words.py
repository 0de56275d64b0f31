"""The words shown in the text images: common English, three to five letters."""

from __future__ import annotations

import random
import zlib

WORDS = tuple(
    """
    able acid aged also area army away baby back ball band bank barn base bath bean bear beat bell belt bend best
    bike bird blue boat body bold bone book boot born both bowl brag brim bulk bush busy cage cake call calm camp
    card care cart case cash cast cave chat chef chin city clay clip club coal coat code coin cold cook cool copy
    core corn cost crab crew crop cube curl dark dash data date dawn deal deep deer desk dial diet dish dock door
    dose down draw drop drum duck dust duty each earn east easy echo edge exam exit face fact fair fall farm fast
    fear feed fern film find fire firm fish flag flat flow fold food foot fork form fort four free frog fuel full
    fund gain game gate gift girl give glad glow glue goal goat gold golf good grab gray grid grip grow gulf hair
    half hall hand hard harp hawk head heat help herb hero hide high hill hint hold home hood hook hope horn host
    hour huge hunt idea inch iron item jazz join joke jump june jury just keen keep kick kind king kite knee knot
    lace lady lake lamb lamp land lane last lawn lead leaf left lens life lift lime line link lion list loaf lock
    logo long loop love luck lung mail main mark mask meal menu milk mill mind mint moon moss move much nail name
    navy near neck nest news next nine noon nose note oak oath obey odd open oval oven over pace pack page pain pair
    palm park part path peak pear pine pink pipe plan play plot plum poem pond pool port pump quay quit quiz race
    rail rain rank read real rice ring rise road rock roof room root rope rose ruby rule safe sail salt sand seal
    seat seed ship shoe shop show silk sing sink size skin snow soap sock soft soil song soup spin star stem step
    stop sugar swan swim tail tale tank taxi team tent test text tide time tiny tone tool town tree trip tube tune
    turn twin unit vase vast verb very vest view vine vote wage walk wall wand warm wash wave west wheat wide wild
    wind wine wing wire wolf wood wool word work yard yarn year yoga zero zinc zone zoom axe ant arm art ash bag bat
    bed bee big box boy bus cab can cap car cat cow cry cup cut day dig dog dot dry ear egg eye fan fig fin fit fix
    fly fog fox fun gap gas gem gum hat hen hip hot ice ink jam jar jaw jet jog joy key kid kit lab leg lid lip log
    map mat mix mud mug net nut oil one orb owl pad pan paw pen pet pie pig pin pot pub ram rat raw ray red rib rod
    row rug sad saw sea sky son spy sun tap tax tea ten tie tin toe top toy tub van vet wax web wet wig win yak yes
    zip zoo angel apple arena badge basil beach bench berry black blaze bloom board brain brave bread brick bride
    brush cabin candy cargo chain chair chalk charm chess chief clean clear climb clock cloud coach coral couch
    court cover craft cream crown curve dance delta diner dream dress drive eagle early earth elbow equal event
    extra faith fancy fever field flame fleet flour focus force forum frame fresh front fruit giant glass globe
    glove grace grain grape green group guide happy heart hobby honey horse hotel house human ivory jelly jewel
    judge juice karma kayak knife label large laser lemon level light linen lucky lunar lunch magic maple march
    medal metal meter might model money month motor mount mouse music night noble north novel nurse ocean olive
    onion opera orbit organ paint panel paper party peace pearl phone photo piano pilot pizza place plane plant
    plate plaza point power prize proud queen quick quiet quilt radar radio raven reach ready rhyme river robot
    round royal salad scale scene scout shade shape shark sharp sheep shelf shell shine shirt shore skate sleep
    small smart smile smoke snack solar solid sound south space spark speed spice spoon sport squad stage stamp
    steam steel stone storm story sweet swift table tiger toast today token torch total tower track trade trail
    train treat truck trust tulip uncle under union urban value vapor video villa vinyl virus visit vivid vocal
    voice water whale wheel white windy world worth yacht young youth zebra
    """.split()  # noqa: SIM905 (a list literal is one word a line)
)

_VOWELS = "AEIOU"
_CONSONANTS = "BCDFGHJKLMNPQRSTVWXYZ"

#: One word in five is never drawn for training images.
HELD_OUT = tuple(sorted(w.upper() for w in set(WORDS) if zlib.crc32(w.encode()) % 5 == 0))
SEEN = tuple(sorted(w.upper() for w in set(WORDS) if zlib.crc32(w.encode()) % 5))
_HELD_OUT_SET = frozenset(HELD_OUT)


def pick_seen(rng: random.Random) -> str:
    """Returns a training word."""
    return rng.choice(SEEN)


def pick_held_out(rng: random.Random) -> str:
    """Returns a word that no training image shows."""
    return rng.choice(HELD_OUT)


def make_up(rng: random.Random) -> str:
    """Returns an invented string of letters that is not a held-out word.

    Half of them alternate consonants and vowels, half are any letters: reading
    them cannot be done by knowing the word list.
    """
    while True:
        length = rng.randint(3, 5)
        if rng.random() < 0.5:
            start = rng.randint(0, 1)
            word = "".join(rng.choice((_CONSONANTS, _VOWELS)[(start + i) % 2]) for i in range(length))
        else:
            word = "".join(rng.choice(_CONSONANTS + _VOWELS) for _ in range(length))
        if word not in _HELD_OUT_SET:
            return word


def pick_for_training(rng: random.Random) -> str:
    """Returns a training word or, as often, an invented string."""
    return pick_seen(rng) if rng.random() < 0.5 else make_up(rng)
