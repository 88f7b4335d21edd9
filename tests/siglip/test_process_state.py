"""Importing siglip and calling a model leave the user's process as it was."""

import pathlib
import sys

import processes

import siglip
from siglip import checkpoints
from siglip.checkpoints.formats import random_weights
from siglip.checkpoints.spec import Spec

ROOT = pathlib.Path(siglip.__file__).parents[1]
SPEC = Spec(
    {"variant": "mu/16"},
    {"variant": "mu", "vocab_size": 259, "out_dim": 32},
    res=32,
    token_len=8,
    vocab_size=259,
    image="hf-siglip",
    tokenizer={"name": "bytes"},
)

# What a library could change behind its user's back. The libraries that siglip needs are imported
# first: what they change when they are imported is not siglip's.
STATE = """
import decimal, faulthandler, gc, locale, logging, multiprocessing, os, random, resource, signal
import socket, sys, threading, warnings
import cv2, flax, jax, numpy, PIL.Image, PIL.ImageFile, tqdm

def state():
    loggers = [logging.root, *(
        logger for name, logger in sorted(logging.Logger.manager.loggerDict.items())
        if isinstance(logger, logging.Logger)
    )]
    settings = [(x.name, x.level, x.disabled, x.propagate, x.handlers[:]) for x in loggers]
    as_created = (logging.NOTSET, False, True, [])
    return {
        "environment": dict(os.environ),
        "working directory": os.getcwd(),
        "umask": [os.umask(mask := os.umask(0)), mask][1],
        "jax.config": dict(jax.config.values),
        "signal handlers": {s: signal.getsignal(s) for s in signal.valid_signals()},
        "logging": [(name, *rest) for name, *rest in settings if tuple(rest) != as_created],
        "logging.disable": logging.root.manager.disable,
        "warnings": warnings.filters[:],
        "showwarning": warnings.showwarning,
        "excepthooks": (sys.excepthook, threading.excepthook, sys.unraisablehook),
        "faulthandler": faulthandler.is_enabled(),
        "random": random.getstate(),
        "numpy.random": str(numpy.random.get_state()),
        "numpy.errstate": numpy.geterr(),
        "numpy.printoptions": numpy.get_printoptions(),
        "locale": locale.setlocale(locale.LC_ALL),
        "decimal": str(decimal.getcontext()),
        "OpenCV": (cv2.getNumThreads(), cv2.useOptimized(), cv2.ocl.useOpenCL()),
        "Pillow": (PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES),
        "limits": [resource.getrlimit(x) for x in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS)],
        "gc": (gc.isenabled(), gc.get_threshold()),
        "recursion": sys.getrecursionlimit(),
        "int digits": sys.get_int_max_str_digits(),
        "switch interval": sys.getswitchinterval(),
        "multiprocessing": multiprocessing.get_start_method(allow_none=True),
        "socket timeout": socket.getdefaulttimeout(),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "path": sys.path[:],
        "matplotlib": "matplotlib" in sys.modules,
        "tqdm's monitor": tqdm.tqdm.monitor_interval,
        "threads": sorted(thread.name for thread in threading.enumerate()),
    }

def check(when):
    after = state()
    for name, value in before.items():
        assert after[name] == value, f"{when} changed {name}: {value!r} -> {after[name]!r}"

cv2.setNumThreads(3)  # not the default, which a change could restore
random.seed(7)
numpy.random.seed(7)
jax.devices()  # starts jax's own threads
before = state()
"""


def test_importing_loading_and_encoding_change_nothing_in_the_process(tmp_path):
    checkpoints.write(random_weights.make(SPEC, "process"), tmp_path / "hf", "huggingface")
    code = f"""{STATE}
import siglip
check("import siglip")
model = siglip.load({str(tmp_path / "hf")!r}, batch_size=8)
check("siglip.load")
images = numpy.zeros((9, 40, 40, 3), numpy.uint8)
assert model.encode_image(images, "tokens").values.shape == (9, 4, 32)
assert model.similarity(images, ["a", "a text that is too long"]).logit.shape == (9, 2)
check("encoding")
print("unchanged")
"""
    done = processes.run([sys.executable, "-c", code], cwd=ROOT)
    assert done.stdout == "unchanged\n", done.stderr


def test_the_comparison_sees_what_a_library_could_change():
    code = f"""{STATE}
for name, change in {{
    "OpenCV": lambda: cv2.setNumThreads(1),
    "environment": lambda: os.environ.update(XLA_FLAGS="x"),
    "logging": lambda: logging.basicConfig(),
    "jax.config": lambda: jax.config.update("jax_debug_nans", True),
    "signal handlers": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "random": lambda: random.random(),
    "numpy.random": lambda: numpy.random.rand(),
    "warnings": lambda: warnings.simplefilter("ignore"),
}}.items():
    before = state()
    change()
    try:
        check("this")
    except AssertionError as error:
        assert f"this changed {{name}}:" in str(error), error
    else:
        raise SystemExit(f"{{name}} is not compared")
print("seen")
"""
    done = processes.run([sys.executable, "-c", code], cwd=ROOT)
    assert done.stdout == "seen\n", done.stderr
