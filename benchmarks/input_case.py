"""The systems that the benchmark of input compares, and the job of a worker.

The standard library alone, because workers of other environments read it too.
"""

import dataclasses
from typing import Any

RES = 224
TOKEN_LEN = 64
CHUNK = 32  # images that a thread of a peer prepares at a time, as in input_pipeline.loader
FAST = "decode | resize"

FORMATS, PRESETS, BARE, PEERS = "Formats", "Presets, from memory", "One thread, no loader", "Peers"
GROUPS = (FORMATS, PRESETS, BARE, PEERS)


@dataclasses.dataclass(frozen=True)
class InputSystem:
    """A way from JPEGs to pixels.

    Attributes:
      name, group: for tables.
      module: the worker.
      options: for the worker; {"source", "image"}, {"resize"} or {"peer"}.
      foreign: it needs packages of requirements-peers.txt.
    """

    name: str
    group: str
    module: str
    options: dict[str, Any]
    foreign: bool = False


@dataclasses.dataclass(frozen=True)
class InputJob:
    """The job of a worker, which gets it as JSON.

    Attributes:
      options: of the InputSystem.
      folder: of the data that input_formats.prepare wrote.
      batch: images of a batch.
      threads: of the loader, or of a peer.
      import_first: a module that open_clip's interpreter imports before the others.
    """

    options: dict[str, Any]
    folder: str
    batch: int
    threads: int
    import_first: str = ""


# Format -> source and its settings; paths are relative to the folder of the data.
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "files, folder": ("files", {"path": "files/pairs.jsonl"}),
    "files, zip": ("files", {"path": "files/pairs.jsonl", "images": "zip/images.zip"}),
    "webdataset": ("webdataset", {"path": "webdataset/*.tar"}),
    # window=2: at most 4 row groups stay in memory, so that most are read, as in large data.
    "parquet": ("parquet", {"path": "parquet/*.parquet", "window": 2}),
    "array_record": ("array_record", {"path": "array_record/*.array_record"}),
}
PATHS = ("path", "images")  # the settings above that are paths

IMAGES = (
    FAST,
    "decode(shrink=224) | resize",
    "decode | random_resized_crop | flip",
    "big_vision",
    "hf-siglip",
    "hf-siglip2",
    "hf-naflex",
)

OURS = FAST  # the systems that the goals name
DECODE = "simplejpeg"
PIL = "PIL bicubic"
EXPLAINED = {
    DECODE: "simplejpeg.decode_jpeg in a loop: what no pipeline around it can exceed",
    "simplejpeg + cv2": "and cv2.resize, linear",
    PIL: "open_clip's path without torch: PIL open, RGB, bicubic to uint8",
    "open_clip, uint8": "its image_transform up to the PIL image",
    "open_clip": "its image_transform, which ends in normalised float32",
    "webdataset + PIL": "the package webdataset reads the tar files, then as PIL bicubic",
    "tf.data": "TFRecord, decode_jpeg, tf.image.resize bilinear to uint8",
}


def systems(peers: bool) -> list[InputSystem]:
    """All systems, in the order of the tables; with `peers` the other projects'."""
    ours, theirs = "benchmarks.input_worker", "benchmarks.input_peers"
    listed = [InputSystem(name, FORMATS, ours, {"source": name, "image": FAST}) for name in SOURCES]
    listed += [
        InputSystem(image, PRESETS, ours, {"source": "", "image": image}) for image in IMAGES
    ]
    listed += [
        InputSystem(DECODE, BARE, ours, {"resize": False}),
        InputSystem("simplejpeg + cv2", BARE, ours, {"resize": True}),
        InputSystem(PIL, PEERS, theirs, {"peer": "pil"}),
    ]
    if peers:
        listed += [
            InputSystem("open_clip, uint8", PEERS, theirs, {"peer": "open_clip_uint8"}, True),
            InputSystem("open_clip", PEERS, theirs, {"peer": "open_clip"}, True),
            InputSystem("webdataset + PIL", PEERS, theirs, {"peer": "webdataset"}, True),
            InputSystem("tf.data", PEERS, theirs, {"peer": "tf_data"}, True),
        ]
    return listed
