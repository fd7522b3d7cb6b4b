"""The vocabulary of the synthetic dataset: categories, their tags, and the parts of titles."""

from __future__ import annotations

# Norway's code comes second: an unquoted NO is false in YAML 1.1.
_COUNTRIES = "DE NO FR GB US JP BR IN SE PL ES IT NL CA AU MX KR FI DK PT AT CH BE CZ IE GR TR AR CL NZ"
COUNTRIES = tuple(_COUNTRIES.split())

BUDGETS = ("low", "medium", "high")  # stated price levels of users
DEVICES = ("phone", "laptop", "tablet")

_ADJECTIVES = (
    "Walnut Amber Nordic Classic Compact Velvet Copper Misty Royal Coastal Rustic Urban Alpine Silver Golden "
    "Crimson Ivory Slate Willow Meadow Lunar Sunny Quiet Bold"
)
ADJECTIVES = tuple(_ADJECTIVES.split())

# Category, singular noun for titles, and six tags.
_KINDS = """
Lamps: desk lamp: lighting bedside dimmable brass reading shade
Running shoes: running shoe: jogging trail marathon cushioned breathable laces
Coffee: coffee blend: espresso arabica roasted beans decaf filter
Tents: tent: camping two-person waterproof lightweight poles groundsheet
Novels: novel: fiction paperback bestseller mystery romance debut
Headphones: headphones: wireless over-ear noise-cancelling studio bluetooth earbuds
Cookware: saucepan: cast-iron non-stick induction kitchen lid stainless
Jigsaw puzzles: jigsaw: thousand-piece landscape family wooden-pieces challenge poster
Bicycles: bicycle: commuter gears gravel helmet-ready frame folding
Houseplants: houseplant: potted evergreen low-light tropical fern succulent
Board games: board game: strategy dice cards two-player party cooperative
Skincare: face cream: moisturiser sensitive vitamin-c serum night fragrance-free
Backpacks: backpack: daypack school rolltop padded laptop-sleeve hiking
Watches: watch: quartz automatic leather-strap diver chronograph sapphire
Tea: tea: green loose-leaf herbal chai oolong caffeine-free
Guitars: guitar: acoustic electric strings fretboard beginner solid-top
Yoga mats: yoga mat: pilates stretching cork non-slip rolled balance
Cameras: camera: mirrorless zoom tripod film portrait lens
Blankets: blanket: fleece wool throw weighted cosy knitted
Garden tools: garden spade: pruning digging shears soil hedge ash-handle
Sunglasses: sunglasses: polarised uv-filter round mirrored aviator tinted
Keyboards: keyboard: mechanical backlit switches ergonomic numpad keycaps
Candles: candle: scented soy beeswax jar vanilla lavender
Fishing rods: fishing rod: spinning fly reel carp telescopic tackle
Winter jackets: winter jacket: down hooded insulated parka windproof quilted
Dog supplies: dog toy: leash chew puppy collar fetch treats
Cat supplies: cat toy: scratching kitten catnip litter feather perch
Baby clothes: baby romper: newborn organic-cotton bib snap infant pyjamas
Model trains: model train: gauge locomotive track hobby scale diorama
Paints: paint set: acrylic watercolour oil brushes pigment canvas
Knives: chef knife: sharpening carbon-steel santoku blade carving forged
Rugs: rug: runner hallway tufted jute persian washable
Mugs: mug: ceramic stoneware handmade glazed travel-lid enamel
Perfumes: perfume: floral citrus musk eau-de-toilette sandalwood gift
Skis: ski: downhill carving-ski bindings powder touring wax
Swimwear: swimsuit: pool bikini trunks chlorine-proof beach quick-dry
Chess sets: chess set: tournament pieces travel-board magnetic rosewood clock
Telescopes: telescope: astronomy refractor eyepiece moon mount stargazing
Microphones: microphone: podcast condenser usb vocals pop-filter recording
Bookshelves: bookshelf: storage oak wall-mounted modular ladder shelving
Office chairs: office chair: lumbar swivel mesh armrest adjustable castors
Bread: bread loaf: sourdough rye wholegrain baked seeded crust
Cheese: cheese: cheddar aged goat soft blue-veined wheel
Chocolate: chocolate bar: dark milk hazelnut fair-trade truffle cocoa
Olive oil: olive oil: extra-virgin cold-pressed harvest unfiltered salad tin
Spices: spice mix: cumin paprika curry ground seasoning whole
Juices: juice: apple orange pressed berry ginger pulp
Notebooks: notebook: dotted ruled hardcover pocket journal planner
Fountain pens: fountain pen: nib ink calligraphy cartridge writing converter
Jewellery: necklace: pendant pearl chain gemstone bracelet earring
Scarves: scarf: silk cashmere winter-wear plaid fringe shawl
Hiking boots: hiking boot: ankle sole waterproof-membrane leather mountain grip
Binoculars: binoculars: birdwatching prism compact-optics safari focus magnification
Power tools: drill: cordless battery torque hammer-drill bits screwdriver
Vacuum cleaners: vacuum cleaner: bagless cordless-stick pet-hair hepa suction handheld
Drones: drone: quadcopter aerial propeller gimbal racing remote
Aquariums: aquarium: freshwater tank gravel-bed pump tropical-fish glass
Climbing gear: climbing harness: rope carabiner chalk belay bouldering quickdraw
Vinyl records: vinyl record: jazz album turntable reissue soul soundtrack
Comics: comic book: superhero manga graphic-novel issue collector illustrated
Toy bricks: brick set: building castle spaceship stacking minifigure vehicle
Umbrellas: umbrella: rain storm-proof foldable automatic-open handle canopy
Luggage: suitcase: carry-on hardshell spinner-wheels cabin lock expandable
Violins: violin: bow rosin strings-set chinrest orchestra spruce
"""

KINDS = tuple(
    (category.strip(), noun.strip(), tuple(tags.split()))
    for category, noun, tags in (line.split(":") for line in _KINDS.strip().splitlines())
)
NUM_TAGS = 6
assert all(len(tags) == NUM_TAGS for _, _, tags in KINDS)


def kind_of_goods(cluster: int) -> tuple[str, str, tuple[str, ...]]:
    """Return category, noun and tags of a cluster; after the last category they repeat with a number."""
    category, noun, tags = KINDS[cluster % len(KINDS)]
    lap = cluster // len(KINDS) + 1
    if lap == 1:
        return category, noun, tags
    return f"{category} {lap}", noun, tuple(f"{tag}-{lap}" for tag in tags)
