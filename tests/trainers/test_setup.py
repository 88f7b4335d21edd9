"""What a config turns into, and values that do not fit each other."""

import contextlib
import math
import pathlib
import types

import jax
import numpy as np
import pytest
from topologies import devices_of

from base.errors import UserError
from input_pipeline.errors import BadExample
from input_pipeline.mixture import Mixture
from siglip import objectives
from siglip.objectives.objective import Objective, Rows
from siglip.sharding import make_mesh
from trainers import data, setup
from trainers.assemble import abstract_batch, make_step
from trainers.config import complete
from trainers.objectives import describe_objectives
from trainers.plan import check_batch, order_hash

QUICKSTART = pathlib.Path(setup.__file__).parents[1] / "configs" / "quickstart.py"


def load(**settings):
    """The quickstart's config; loss__x is x of its objective."""
    keys = (key.replace("loss__", "objectives__contrastive__") for key in settings)
    values = map(str, settings.values())
    overrides = [(key.replace("__", "."), value) for key, value in zip(keys, values)]
    return complete.load(str(QUICKSTART), overrides)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, -math.log(63)),
        ({"loss__negatives": "hard", "loss__ratio": 7}, -math.log(7)),
        ({"loss__negatives": "hard", "loss__ratio": 1000}, -math.log(63)),
        ({"loss__relative_bias": True}, math.log(63) / 10),
        ({"loss__name": "softmax"}, -math.log(63)),
    ],
)
def test_an_automatic_bias_is_the_prior_of_the_batch(settings, expected):
    config = load(model__b_init="auto", **settings)
    assert setup.make_setup(config).model.b_init == pytest.approx(expected)


def test_attention_is_that_of_the_devices_of_the_mesh():
    tpus = devices_of("v4:2x2x1")
    for devices, settings, expected in [
        (None, {}, "xla"),
        (tpus, {}, "tpu"),
        (tpus, {"model__attention": "fused"}, "fused"),
    ]:
        model = setup.make_setup(load(**settings), devices).model
        assert (model.img.attention, model.txt.attention) == (expected, expected)


def test_only_the_training_step_has_the_fused_attention_of_tpus():
    devices = devices_of("v4:2x2x1")
    config = load(model__attention="fused", model__dtype="bfloat16", model__scan=True)
    made = setup.make_setup(config, devices)
    step = make_step(made, total_steps=9, examples_per_epoch=64)
    program = step.trace(abstract_batch(made), made.mesh).lower().as_text()
    # Two towers' scanned blocks, and at least the backward pass of each has its own.
    assert program.count("@tpu_custom_call") >= 4
    params = made.abstract_towers()
    embed = jax.jit(made.model.apply).trace({"params": params}, *made.inputs)
    assert "tpu_custom_call" not in embed.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"loss__relative_bias": True}, "b_init=-10.0 is not; set config.model.b_init=auto"),
        ({"loss__ratio": 5}, "contrastive: ratio 5 needs negatives"),
        ({"loss__tile": -1}, "contrastive: tile must be a number of rows"),
        ({"loss__unroll": 0}, "contrastive: unroll must be at least 1"),
        ({"loss__exchange": "circle"}, "contrastive: exchange 'circle' is none of auto, ring"),
        ({"model__t_init": 0, "model__b_init": "auto"}, "t_init is the temperature"),
        ({"model__attention": "fused"}, "model: attention 'fused' has kernels for TPUs"),
        ({"loss__name": "softmax", "loss__duplicates": "positive"}, "the softmax loss takes"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        setup.make_setup(load(**settings))


def test_a_microbatch_divides_the_batch_and_the_devices():
    for microbatch in (8, 32, 64, 0):
        check_batch(load(input__microbatch=microbatch), make_mesh())
    for microbatch in (4, 24, 128):
        with pytest.raises(UserError, match=r"one of 8, 16, 32, 64$"):
            check_batch(load(input__microbatch=microbatch), make_mesh())


def test_a_group_divides_what_a_device_computes_at_a_time():
    for settings in ({"img__group": 4}, {"txt__group": 99}, {"img__group": 0}):
        check_batch(load(**{f"model__{k}": v for k, v in settings.items()}), make_mesh())
    with pytest.raises(
        UserError, match=r"config.model.img.group=3 must divide the 8 .* 1, 2, 4, 8"
    ):
        check_batch(load(model__img__group=3), make_mesh())
    with pytest.raises(UserError, match=r"txt.group=3 must divide the 4 .* one of 1, 2, 4$"):
        check_batch(load(model__txt__group=3, input__microbatch=32), make_mesh())


def test_the_loss_tells_its_settings_and_the_exchange_it_chose():
    def describe(**settings):
        made = setup.make_setup(load(**settings))
        return describe_objectives(made.config, made.model, made.mesh)

    chosen = describe(loss__duplicates="ignore")
    assert chosen.startswith("sigmoid, duplicates ignore, exchange gather (cpu, n=8, d=64, D=8: r")
    assert describe(loss__name="softmax", loss__exchange="ring") == "softmax, exchange ring"
    two = {"objectives__second__name": "softmax", "objectives__second__weight": 0.5}
    both = describe(**two, loss__exchange="ring", objectives__second__exchange="gather")
    assert both == (
        "1 x contrastive = sigmoid, exchange ring; 0.5 x second = softmax, exchange gather"
    )


@pytest.mark.parametrize(("allowed", "refused"), [(0.2, True), (0.3, False)])
def test_what_a_source_left_out_counts_as_bad_examples(allowed, refused, caplog):
    class Source:
        def __init__(self):
            self.damage = {("no caption", "a.tar"): 2, ("damaged record", "b.tar"): 1}

        def __len__(self):
            return 8

    if refused:
        with pytest.raises(UserError, match=r"3 samples of cc12m are left out, 8 are not: a"):
            data._check_damage({"cc12m": Source()}, allowed)
    else:
        data._check_damage({"cc12m": Source(), "other": range(3)}, allowed)
        assert "b.tar: 1 damaged record" in caplog.text


@pytest.mark.parametrize(("allowed", "refused"), [(0.2, False), (0.1, True), (0, True)])
def test_samples_left_out_at_the_start_are_held_to_their_exact_share(allowed, refused):
    class Source(list):
        damage = types.MappingProxyType({("no caption", "a.tar"): 1})

    with pytest.raises(UserError) if refused else contextlib.nullcontext():
        data._check_damage({"tiny": Source(range(8))}, allowed)


def test_the_hash_of_an_order_changes_with_whatever_changes_the_order():
    class Blocks(list):
        blocks, window = np.array([0, 50, 100]), 2

    def hashed(source, **settings):
        return order_hash(load(**settings), source)

    one = hashed(range(100))
    assert one == hashed(range(100)) == hashed(list("ab") * 50)
    parts = {"a": range(60), "b": range(40)}
    mixtures = [Mixture(parts, weights) for weights in ((1, 1), (1, 2))]
    others = [
        hashed(range(100), seed=1),
        hashed(range(101)),
        hashed(range(100), input__corrupt="image(0.1)"),
        hashed(Blocks(range(100))),
        *map(hashed, mixtures),
    ]
    assert len({one, *others}) == 7


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 5.0, float("nan")])
def test_a_share_of_bad_examples_is_a_share(fraction):
    with pytest.raises(UserError, match=r"max_bad_fraction=.* must be from 0 to 1"):
        check_batch(load(input__max_bad_fraction=fraction), make_mesh())


@pytest.mark.parametrize(("ids", "fits"), [(250_100, True), (250_101, False), (250_000, True)])
def test_mc4s_tokenizer_may_have_a_hundred_ids_more_than_the_table(monkeypatch, ids, fits):
    """The multilingual models have 250,000 rows; a text with such an id is refused, not NaN."""
    config = complete.load(f"{QUICKSTART}", [("model.txt.vocab_size", "250000")])

    class Tokenizer:
        vocab_size, eos_id = ids, 1

        def encode(self, text):
            return [250_050] if text == "extra" else [5]

    monkeypatch.setitem(data.TOKENIZERS, "bytes", Tokenizer)
    if not fits:
        with pytest.raises(UserError, match="vocab_size is 250000, but the tokenizer has 250101"):
            setup.make_setup(config)
        return
    preprocess = setup.make_setup(config).preprocess
    assert preprocess.text("a")[0] == 5
    if ids > 250_000:
        with pytest.raises(BadExample, match="token 250050, and the model has 250000 rows"):
            preprocess.text("extra")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retrieval__captions": "some"}, "retrieval: captions 'some' is none of all, first"),
        ({"zeroshot__aliases": "some"}, "zeroshot: aliases 'some' is none of first, all"),
        ({"val__batch_size": 3}, "val: batch_size=3 does not divide over 8 devices"),
        ({"val__source__name": "files", "val__source__path": "gone.csv"}, "val: .*gone.csv"),
    ],
)
def test_a_mistake_in_an_evaluator_names_it(changes, message):
    config = load(**{f"evals__{key}": value for key, value in changes.items()})
    with pytest.raises(UserError, match=rf"^config\.evals\.{message}"):
        setup.make_evaluators(setup.make_setup(config))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("img/blok:0", "'blok:0' is neither 'attention' nor a block"),
        ("txt/attention", "'attention' needs a tower with attention pooling"),
        ("image/block:0", "capture 'image/block:0' begins with neither img/ nor txt/"),
    ],
)
def test_an_objective_that_captures_what_no_tower_has_is_one_line(monkeypatch, name, message):
    factory = lambda model, mesh: Objective(lambda *_: Rows(), capture=(name,))  # noqa: E731
    monkeypatch.setitem(objectives.OBJECTIVES, "x", factory)
    config = load(objectives__own__name="x")
    with pytest.raises(UserError, match=f"^config.objectives.own: {message}") as error:
        setup.make_setup(config)
    assert "\n" not in str(error.value)
