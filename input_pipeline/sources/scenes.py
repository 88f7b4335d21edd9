"""A source of drawn scenes with captions: data for the quickstart, nothing to download.

A scene has a large main shape and a small second one, each with a colour, a relation between them
and a background: 'a red star above a small blue ring on black'. Every eighth combination of these
attributes is held out: it occurs in the split 'val' and never in 'train', whatever the seed.
"""

import numpy as np
from jaxtyping import Float, Int, UInt8

from base.errors import UserError
from input_pipeline.sources.contract import Example

# Names are short so that the longest caption, with its end token, has 48 bytes.
COLOURS = {
    "red": (215, 35, 35),
    "blue": (45, 90, 245),
    "lime": (60, 200, 50),
    "gold": (245, 180, 20),
    "pink": (255, 130, 190),
    "cyan": (40, 215, 225),
    "plum": (135, 35, 150),
    "gray": (128, 128, 128),
}
BACKGROUNDS = {
    "black": (10, 10, 10),
    "white": (245, 245, 245),
    "navy": (20, 25, 85),
    "tan": (205, 175, 140),
}
# Name, its inverse, and the direction (right, down) from the main shape to the second.
RELATIONS = (
    ("above", "below", (0, 1)),
    ("below", "above", (0, -1)),
    ("left of", "right of", (1, 0)),
    ("right of", "left of", (-1, 0)),
)
HELD_OUT = 8  # one of this many combinations is held out
SIZES = {"train": 16_384, "val": 500}
CHUNK = 1024  # images drawn at a time, which bounds the memory of the drawing


def _star(x, y):
    # Five points: reflect into one point's wedge, then the distance to one edge
    # (Quilez, https://iquilezles.org/articles/distfunctions2d, sdStar5).
    k1 = np.array([np.cos(np.pi / 5), -np.sin(np.pi / 5)], np.float32)
    x, y = np.abs(x), -y
    for kx, ky in (k1, -k1 * np.array([1, -1], np.float32)):
        fold = 2 * np.maximum(kx * x + ky * y, 0)
        x, y = x - fold * kx, y - fold * ky
    x, y = np.abs(x), y - 1.1
    edge = 0.45 * np.array([-k1[1], k1[0]], np.float32) - np.array([0, 1], np.float32)
    h = np.clip((x * edge[0] + y * edge[1]) / (edge @ edge), 0, 1.1)
    far = np.hypot(x - edge[0] * h, y - edge[1] * h)
    return far * np.sign(y * edge[0] - x * edge[1])


def _plus(x, y):
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 1, np.minimum(x, y) - 0.32)


# Signed distance to each shape of radius about 1 round the origin, y downwards, negative inside.
SHAPES = {
    "disc": lambda x, y: np.hypot(x, y) - 0.95,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.75) - 0.24,
    "box": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.82,
    "star": _star,
    "plus": _plus,
    "moon": lambda x, y: np.maximum(np.hypot(x, y) - 1, 0.85 - np.hypot(x - 0.55, y)),
}

# The attributes of one combination, as digits of its number.
RADICES = (len(COLOURS), len(SHAPES), len(COLOURS), len(SHAPES), len(RELATIONS), len(BACKGROUNDS))


def combinations(split: str) -> Int[np.ndarray, "m 6"]:
    """All combinations of a split: (colour, shape) of the main and of the second, relation, ground.

    The two shapes of a scene differ in colour or form.
    """
    number = np.arange(np.prod(RADICES), dtype=np.uint64)
    # A fixed mix of bits (splitmix64) decides: independent of seeds and of any order of drawing.
    h = (number + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    held_out = (h ^ (h >> np.uint64(31))) % np.uint64(HELD_OUT) == 0
    attributes = np.stack(np.unravel_index(number.astype(np.int64), RADICES), axis=1)
    same = (attributes[:, :2] == attributes[:, 2:4]).all(1)
    return attributes[~same & (held_out == (split == "val"))]


def captions(attributes: Int[np.ndarray, "6"]) -> list[str]:
    """Captions of one scene, the plainest first; each names all its attributes."""
    colour, shape, colour2, shape2, relation, ground = attributes
    colours, shapes = tuple(COLOURS), tuple(SHAPES)
    main = f"{colours[colour]} {shapes[shape]}"
    second = f"small {colours[colour2]} {shapes[shape2]}"
    on = f"on {tuple(BACKGROUNDS)[ground]}"
    relation, inverse, _ = RELATIONS[relation]
    return [
        f"a {main} {relation} a {second} {on}",
        f"a {second} {inverse} a {main} {on}",
        f"{on} a {main} {relation} a {second}",
        f"{main} {relation} {second} {on}",
    ]


def draw(
    attributes: Int[np.ndarray, "n 6"], res: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "n res res 3"]:
    """Draws scenes, each with random jitter of position, size, angle and colour, and noise."""
    n = len(attributes)

    def uniform(low, high, *shape):
        return rng.uniform(low, high, (n, *shape)).astype(np.float32)

    # The frame is 2 x 2 units around (0, 0). With these ranges both shapes stay inside it and
    # do not touch.
    direction = np.array([shift for _, _, shift in RELATIONS], np.float32)[attributes[:, 4]]
    normal = direction[:, ::-1]
    main_centre = -direction * uniform(0.34, 0.46, 1) + normal * uniform(-0.3, 0.3, 1)
    second_centre = direction * uniform(0.54, 0.64, 1) + normal * uniform(-0.45, 0.45, 1)
    image = _jittered(BACKGROUNDS, attributes[:, 5], uniform(-8, 8, 3))
    image = np.broadcast_to(image[:, None, None], (n, res, res, 3)).copy()
    for digit, centre, radius in (
        (0, main_centre, uniform(0.44, 0.5)),
        (2, second_centre, uniform(0.28, 0.33)),
    ):
        colour = _jittered(COLOURS, attributes[:, digit], uniform(-15, 15, 3))
        cover = _cover(attributes[:, digit + 1], centre, radius, uniform(-0.2, 0.2), res)[..., None]
        image += cover * (colour[:, None, None] - image)
    image += 5 * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _jittered(palette: dict, chosen: Int[np.ndarray, " n"], jitter: Float[np.ndarray, "n 3"]):
    return np.array(list(palette.values()), np.float32)[chosen] + jitter


def _cover(
    shape: Int[np.ndarray, " n"],
    centre: Float[np.ndarray, "n 2"],
    radius: Float[np.ndarray, " n"],
    angle: Float[np.ndarray, " n"],
    res: int,
) -> Float[np.ndarray, "n res res"]:
    """Share of each pixel that the shape covers, 0 to 1, with edges about one pixel wide."""
    axis = (2 * np.arange(res, dtype=np.float32) + 1) / res - 1
    out = np.empty((len(shape), res, res), np.float32)
    for i, distance in enumerate(SHAPES.values()):
        which = shape == i
        scale = radius[which, None, None]
        x = (axis[None, None, :] - centre[which, 0, None, None]) / scale
        y = (axis[None, :, None] - centre[which, 1, None, None]) / scale
        cos, sin = np.cos(angle[which])[:, None, None], np.sin(angle[which])[:, None, None]
        inside = -distance(cos * x + sin * y, cos * y - sin * x) * scale * (res / 2)  # in pixels
        out[which] = np.clip(inside + 0.5, 0, 1)
    return out


class Scenes:
    """Scenes drawn when the source is made; equal arguments give equal scenes.

    `label` is the main (large) shape with its colour, one of 48 `class_names` such as 'red star'.
    Suitable zero-shot templates: 'a {}', 'a {} on black', 'a {} on white'.

    Args:
      split: 'train', whose captions come in several wordings, or 'val', with one caption for each
        scene, all different, of attribute combinations that 'train' never has.
      size: number of scenes; 0 means 16,384 for 'train' and 500 for 'val'.
      res: side of the images in pixels.
      seed: seed of the drawing.

    Raises:
      UserError: a split that does not exist, or more 'val' scenes than held-out combinations.
    """

    def __init__(self, *, split: str = "train", size: int = 0, res: int = 32, seed: int = 0):
        if split not in SIZES:
            raise UserError(f"scenes: split {split!r} does not exist, use 'train' or 'val'")
        if size < 0 or res < 16:
            raise UserError(f"scenes: size {size} must be 0 or more and res {res} at least 16")
        size = size or SIZES[split]
        combos = combinations(split)
        if split == "val" and size > len(combos):
            raise UserError(f"scenes: size {size} is too large, 'val' has {len(combos)} scenes")
        rng = np.random.default_rng([seed, split == "val"])
        # Each combination occurs once before any occurs again.
        order = [rng.permutation(len(combos)) for _ in range(-(-size // len(combos)))]
        self.split = split
        self.attributes = combos[np.concatenate(order)[:size]]
        self.images = np.empty((size, res, res, 3), np.uint8)
        for i in range(0, size, CHUNK):
            self.images[i : i + CHUNK] = draw(self.attributes[i : i + CHUNK], res, rng)
        self.images.flags.writeable = False  # examples are views, shared by threads
        self.class_names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Example:
        attributes = self.attributes[i]
        texts = captions(attributes)
        return {
            "image": self.images[i],
            "texts": texts if self.split == "train" else texts[:1],
            "label": int(attributes[0] * len(SHAPES) + attributes[1]),
            "id": f"scenes/{self.split}/{i}",
        }
