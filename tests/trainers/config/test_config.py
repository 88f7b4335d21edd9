"""Config files and overrides: completed from signatures, refused in one line."""

import json
import pathlib
import re
import sys

import processes
import pytest

from base.errors import UserError
from trainers.config import complete, schema, stored
from trainers.config.schema import Block


def make_model(
    *, img: dict, t_init: float = 10.0, b_init: float | None = -10.0, scan: bool = False
):
    pass


def make_vit(dtype="float32", *, variant: str = "B/16", width: int | None = None):
    pass


def adamw(*, b1: float = 0.9, b2: float = 0.95):
    pass


def lion(*, b1: float = 0.8, sign_decay: float = 0.5):
    pass


def cosine(total_steps, to_steps, *, warmup: str = "0 steps"):
    pass


class Files:
    def __init__(self, *, path: str, split: str = "train"):
        pass


class Emoji:
    def __init__(self, *, data_dir: str, languages: str | tuple = ("en",), split: str = "train"):
        pass


class Retrieval:
    def __init__(self, model, source, *, batch_size: int = 256, ks: tuple[int, ...] = (1, 5)):
        pass


class Loss:
    def __init__(self, model, source, *, batch_size: int = 128):
        pass


SOURCES = {"files": Files, "emoji": Emoji}
FAKES = {
    "model": Block((make_model,)),
    "model.img": Block((make_vit,)),
    "loss": Block(
        (), "name", {"sigmoid": lambda mesh: None, "softmax": lambda mesh: None}, "sigmoid"
    ),
    "input": Block((schema.InputKeys,)),
    "input.source": Block((), "name", SOURCES),
    "input.tokenizer": Block((), "name", {"bytes": lambda: 0, "sentencepiece": Files}, "bytes"),
    "optimizer": Block((), "name", {"adamw": adamw, "lion": lion}, "adamw"),
    "schedule": Block((), "name", {"cosine": cosine}, "cosine"),
    "evals.*": Block((schema.EvalKeys,), "type", {"retrieval": Retrieval, "loss": Loss}),
    "evals.*.source": Block((), "name", SOURCES),
}

CONFIG = """\
from ml_collections import ConfigDict


def get_config(batch_size=32, lr=1e-2, variant="Ti/8", langs=("en",), runlocal=False, init=None):
    config = ConfigDict()
    config.lr = lr
    config.init = init
    config.input = {"batch_size": batch_size, "source": {"name": "emoji", "data_dir": "emo"}}
    config.input.source.languages = langs
    config.model = {"img": {"variant": variant}}
    config.optimizer = {"name": "adamw", "b1": 0.7}
    config.evals = {
        "r": {"type": "retrieval", "every": "1 epoch", "ks": (1,), "source": {"name": "emoji"}}
    }
    config.evals.r.source.data_dir = "emo"
    if runlocal:
        config.total = "3 steps"
    return config
"""


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    """A config that is relative to the folder it is run in, as a user's is."""
    blocks = dict(schema.BLOCKS)
    schema.BLOCKS.update(FAKES)
    del schema.BLOCKS["model.txt"]
    monkeypatch.chdir(tmp_path)
    pathlib.Path("configs").mkdir()
    pathlib.Path("configs/emoji.py").write_text(CONFIG)
    yield "configs/emoji.py"
    schema.BLOCKS.clear()  # the page of all keys has their order, which setitem would change
    schema.BLOCKS.update(blocks)


def edited(config_file: str, old: str, new: str) -> str:
    path = pathlib.Path(config_file)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return config_file


def refused(config_flag: str, *overrides: tuple[str, str]) -> str:
    with pytest.raises(UserError) as error:
        complete.load(config_flag, overrides)
    line = str(error.value)
    assert "\n" not in line
    return line


# What a complete config holds


def test_what_the_file_leaves_out_comes_from_the_signatures(config_file):
    config = complete.load(config_file)
    assert config.model.img.to_dict() == {"variant": "Ti/8", "width": None}
    assert config.model.t_init == 10.0 and config.model.scan is False
    assert config.optimizer.to_dict() == {"name": "adamw", "b1": 0.7, "b2": 0.95}
    assert config.schedule.to_dict() == {"name": "cosine", "warmup": "0 steps"}
    assert config.input.tokenizer.to_dict() == {"name": "bytes"}
    assert config.checkpoint.to_dict() == {"every": "1000 steps", "keep_last": 2, "keep_every": ""}
    assert config.mesh.to_dict() == {"data": -1, "fsdp": 1, "cpu_devices": 0}
    assert config.evals.r.batch_size == 256 and config.evals.r.source.split == "train"
    assert (config.seed, config.lr, config.wd, config.total) == (0, 1e-2, 1e-4, "10 epochs")
    assert config.wd_mults == ((".*/kernel", 1.0), ("else", 0.0))


def test_a_complete_config_has_no_room_for_a_typo_in_the_program(config_file):
    config = complete.load(config_file)
    with pytest.raises((AttributeError, KeyError)):
        config.learning_rate = 1.0


def test_arguments_are_typed_by_their_defaults(config_file):
    config = complete.load(f"{config_file}:batch_size=64,lr=1,variant=B/16,langs=(en,de),runlocal")
    assert config.input.batch_size == 64 and type(config.lr) is float
    assert config.model.img.variant == "B/16" and config.total == "3 steps"
    assert config.input.source.languages == ("en", "de")
    assert complete.load(f"{config_file}:langs=(en,),runlocal=false,init=a/b").init == "a/b"
    assert complete.load(f"{config_file}:init='a,b'").init == "a,b"  # quotes keep commas together


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("seed", "7", 7),
        ("lr", "3", 3.0),
        ("lr", "1e-4", 1e-4),
        ("model.scan", "true", True),
        ("clip_norm", "None", None),
        ("clip_norm", "2", 2.0),
        ("init", "runs/a", "runs/a"),
        ("init", "None", None),
        ("model.img.width", "64", 64),
        ("model.b_init", "None", None),
        ("total", "3e9 examples", "3e9 examples"),
        ("frozen", "(('img/.*', True), ('else', False))", (("img/.*", True), ("else", False))),
        ("evals.r.ks", "1,10", (1, 10)),
        ("evals.r.ks", "[1, 10]", (1, 10)),
        ("evals.r.ks", "5", (5,)),
        ("evals.r.every", "", ""),
        ("input.source.languages", "all", "all"),
        ("input.source.languages", "None", "None"),
        ("input.source.languages", "('en', 'de')", ("en", "de")),
    ],
)
def test_an_override_reaches_every_key_with_its_type(config_file, key, text, value):
    node = complete.load(config_file, [(key, text)])
    for name in key.split("."):
        node = node[name]
    assert node == value and type(node) is type(value)


def test_the_last_override_of_a_key_wins(config_file):
    assert complete.load(config_file, [("seed", "1"), ("seed", "2")]).seed == 2


def test_another_component_starts_from_its_own_defaults(config_file):
    config = complete.load(
        config_file, [("optimizer.sign_decay", "0.1"), ("optimizer.name", "lion")]
    )
    assert config.optimizer.to_dict() == {"name": "lion", "b1": 0.8, "sign_decay": 0.1}
    tokenizer = [("input.tokenizer.name", "sentencepiece"), ("input.tokenizer.path", "a.model")]
    config = complete.load(config_file, tokenizer)
    assert config.input.tokenizer.path == "a.model"
    # What belongs to every evaluator stays, what was retrieval's goes.
    config = complete.load(config_file, [("evals.r.type", "loss")])
    assert config.evals.r.every == "1 epoch" and config.evals.r.source.name == "emoji"
    assert config.evals.r.batch_size == 128 and "ks" not in config.evals.r


def test_naming_the_present_component_changes_nothing(config_file):
    assert complete.load(config_file, [("optimizer.name", "adamw")]).optimizer.b1 == 0.7


# What is refused, and how it is told


def test_a_misspelt_key_of_the_file_names_place_and_nearest(config_file):
    told = refused(edited(config_file, '"batch_size": batch_size', '"bach_size": batch_size'))
    assert told == (
        "configs/emoji.py:8: unknown key config.input.bach_size; the nearest: "
        "config.input.batch_size"
    )


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("input.bach_size", "--config.input.batch_size"),
        ("batch_size", "--config.input.batch_size"),
        ("width", "--config.model.img.width"),
        ("modle.img.variant", "--config.model.img.variant"),
        ("model.img.varient", "--config.model.img.variant"),
        ("evals.q.batch_size", "nearest: --config.evals.r.batch_size, --config.input.batch_size"),
        ("inptu.sorce.data_di", "nearest: --config.input.source.data_dir"),
        ("lr.x", "--config.lr"),
        ("qqq", "--config.seed"),
    ],
)
def test_a_misspelt_override_names_the_nearest(config_file, key, nearest):
    told = refused(config_file, (key, "1"))
    assert told.startswith(f"unknown key --config.{key}; the ") and nearest in told


def test_all_misspelt_keys_are_told_at_once_at_any_depth(config_file):
    told = refused(edited(config_file, '"variant": variant', '"variantt": variant, "widht": 3'))
    assert "unknown key config.model.img.variantt" in told
    assert "unknown key config.model.img.widht" in told


def test_a_key_of_another_component_says_whose_it_is(config_file):
    told = refused(config_file, ("optimizer.sign_decay", "1"))
    assert told == (
        "unknown key --config.optimizer.sign_decay: it is a key of --config.optimizer.name=lion, "
        "not of 'adamw'"
    )


def test_an_unknown_component_names_the_nearest(config_file):
    told = refused(config_file, ("input.source.name", "emojis"))
    assert told == "--config.input.source.name = 'emojis' is unknown; the nearest: emoji"
    told = refused(edited(config_file, '"retrieval"', '"retreival"'))
    assert told == (
        "configs/emoji.py:13: config.evals.r.type = 'retreival' is unknown; the nearest: retrieval"
    )


@pytest.mark.parametrize(
    ("key", "text", "wanted"),
    [
        ("seed", "1.5", "an int"),
        ("lr", "abc", "a float"),
        ("clip_norm", "abc", "a float or None"),
        ("model.scan", "7", "a bool"),
        ("frozen", "((", "a tuple"),
        ("evals.r.ks", "a,b", "a tuple"),
        ("seed", "None", "an int"),
    ],
)
def test_a_text_of_another_type_is_refused(config_file, key, text, wanted):
    assert refused(config_file, (key, text)) == f"--config.{key}={text} is not {wanted}"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("lr = '1e-2'", "lr = '1e-2' must be a float, not a str"),
        ("lr = True", "lr = True must be a float, not a bool"),
        ("lr = None", "lr = None must be a float, not None"),
        ("lr = {'a': 1}", "lr = {'a': 1} must be a float, not a dict"),
        ("seed = True", "seed = True must be an int, not a bool"),
        ("clip_norm = 'x'", "clip_norm = 'x' must be a float or None, not a str"),
    ],
)
def test_a_value_of_another_type_in_the_file_is_refused(config_file, line, told):
    edited(config_file, "config.lr = lr", f"config.{line}")
    assert re.fullmatch(rf"configs/emoji\.py(:6)?: config\.{re.escape(told)}", refused(config_file))


def test_a_line_is_named_only_where_it_is_certain(config_file):
    edited(config_file, "config.lr = lr", "config.seed = 'x'")
    assert refused(config_file).startswith("configs/emoji.py:6: config.seed = 'x'")
    edited(config_file, "return config", "return config  # config.seed = 1")
    assert refused(config_file).startswith("configs/emoji.py: config.seed = 'x'")


def test_a_block_is_no_value_and_a_value_no_block(config_file):
    told = refused(config_file, ("model.img", "B/16"))
    assert told.startswith(
        "--config.model.img is a block; set one of its keys: --config.model.img."
    )
    told = refused(edited(config_file, '"img": {"variant": variant}', '"img": variant'))
    assert "config.model.img is a block of keys, not 'Ti/8'" in told


@pytest.mark.parametrize("text", ["10 epoks", "ten epochs", "10", "1.5 steps"])
def test_a_duration_is_checked_where_it_is_written(config_file, text):
    assert f"config.total = {text!r}" in refused(config_file, ("total", text))
    edited(config_file, '"1 epoch"', repr(text))
    assert f"config.evals.r.every = {text!r}" in refused(config_file)


def test_a_required_key_asks_to_be_passed(config_file):
    told = refused(edited(config_file, ', "data_dir": "emo"', ""))
    assert told == (
        "configs/emoji.py: config.input.source.data_dir must be given: pass "
        "--config.input.source.data_dir=..."
    )
    config = complete.load(config_file, [("input.source.data_dir", "elsewhere")])
    assert config.input.source.data_dir == "elsewhere"


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ("bach_size=3", "configs/emoji.py takes no argument 'bach_size'; the nearest: batch_size"),
        ("batch_size=many", "configs/emoji.py: argument batch_size=many is not an int"),
        ("batch_size", "configs/emoji.py: argument batch_size needs a value, batch_size=..."),
        ("lr=1,lr=2", "configs/emoji.py: argument lr is given twice"),
    ],
)
def test_arguments_of_the_file_are_checked(config_file, args, told):
    assert refused(f"{config_file}:{args}") == told


def test_an_argument_without_a_default_is_asked_for(config_file):
    edited(config_file, "get_config(batch_size=32", "get_config(batch_size")
    assert refused(config_file).endswith("--config=configs/emoji.py:batch_size=...")
    assert complete.load(f"{config_file}:batch_size=4").input.batch_size == 4


@pytest.mark.parametrize("flag", ["configs/emojy.py", "configs/emoji", "emoji.py:batch_size=3"])
def test_a_missing_file_names_the_nearest(config_file, flag):
    assert refused(flag).startswith(f"--config={flag}: ")
    assert refused(flag).endswith("; the nearest: configs/emoji.py")


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ("config.lr = = lr", "configs/emoji.py:6: SyntaxError: invalid syntax"),
        ("config.lr = lrr", "configs/emoji.py:6: NameError: name 'lrr' is not defined"),
        ("config.lr = config.nope", "configs/emoji.py:6: AttributeError: "),
        ("raise ValueError('pass\\n data')", "configs/emoji.py:6: pass data"),
        ("return 3", "configs/emoji.py: get_config() must return a ConfigDict, not 3"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_line(config_file, bad, told):
    assert told in refused(edited(config_file, "config.lr = lr", bad))


# The config of a workdir


def test_a_saved_config_is_read_back_equal_and_can_be_overridden(config_file):
    config = complete.load(config_file)
    stored.save(config, "w")
    assert stored.read("w").to_dict() == config.to_dict()
    assert stored.read("w", [("optimizer.name", "lion")]).optimizer.b1 == 0.8
    assert [p.name for p in pathlib.Path("w").iterdir()] == ["config.json"]


def test_reading_tells_what_is_wrong_with_the_workdir(config_file):
    with pytest.raises(UserError, match=r"^w holds no run: there is no config\.json in it$"):
        stored.read("w")
    pathlib.Path("w").mkdir()
    pathlib.Path("w/config.json").write_text("{")
    with pytest.raises(UserError, match=r"^w/config\.json cannot be read: "):
        stored.read("w")


def differing(config_file, *overrides) -> str:
    stored.save(complete.load(config_file), "w")
    try:
        stored.check_workdir(complete.load(config_file, overrides), "w")
    except UserError as error:
        return str(error)
    return ""


def test_a_workdir_of_another_configuration_is_refused_with_the_differences(config_file):
    told = differing(config_file, ("seed", "1"), ("input.batch_size", "64"))
    assert told == (
        "w holds a run of another configuration: config.seed: there 0, here 1; "
        "config.input.batch_size: there 32, here 64 (use another --workdir, or the settings of the "
        "run to go on with it)"
    )


def test_of_another_component_only_the_name_is_told(config_file):
    told = differing(config_file, ("optimizer.name", "lion"))
    assert "config.optimizer.name: there 'adamw', here 'lion' (" in told


def test_many_differences_are_counted(config_file):
    keys = ("lr", "wd", "seed", "clip_norm", "model.t_init", "model.b_init", "optimizer.b1")
    told = differing(config_file, *((key, "77") for key in keys))
    assert told.count(": there ") == 6 and "; and 1 more (" in told


@pytest.mark.parametrize(
    "override",
    [
        ("log_every", "1"),
        ("evals.r.type", "loss"),
        ("checkpoint.keep_last", "5"),
        ("mesh.fsdp", "2"),
        ("input.num_threads", "1"),
        ("input.max_bad_fraction", "0.5"),
        ("input.source.data_dir", "moved"),
    ],
)
def test_what_does_not_change_the_learning_may_differ(config_file, override):
    assert differing(config_file, override) == ""
    config = complete.load(config_file, [override])
    assert override[0] in [d.key for d in stored.differences(config, "w")]


@pytest.mark.parametrize("override", [("log_everyx", "1"), ("input.source.split", "val")])
def test_free_keys_are_whole_names(config_file, override):
    assert stored.Difference(override[0], "", "").free is False


@pytest.mark.parametrize(
    "key", ["model.remat", "model.attention", "model.img.group", "model.txt.group"]
)
def test_how_towers_are_computed_is_free(key):
    assert stored.Difference(key, "", "").free is True


def test_a_new_workdir_and_the_same_config_pass(config_file):
    config = complete.load(config_file)
    stored.check_workdir(config, "new")
    stored.save(config, "w")
    stored.check_workdir(complete.load(config_file), "w")
    assert stored.differences(config, "w") == []


def test_a_key_that_an_older_version_did_not_have_had_its_default(config_file):
    config = complete.load(config_file)
    older = config.to_dict()
    del older["model"]["t_init"]
    pathlib.Path("w").mkdir()
    pathlib.Path("w/config.json").write_text(json.dumps(older))
    stored.check_workdir(config, "w")
    with pytest.raises(UserError, match=r"config\.model\.t_init: there 10\.0, here 11\.0"):
        stored.check_workdir(complete.load(config_file, [("model.t_init", "11")]), "w")


def test_a_workdir_that_is_a_file_is_refused(config_file):
    pathlib.Path("w").write_text("")
    with pytest.raises(UserError, match="--workdir=w is a file, not a folder"):
        stored.check_workdir(complete.load(config_file), "w")


# The real components


def test_every_block_of_the_table_has_typed_keys():
    for path, block in schema.BLOCKS.items():
        for fn in (*block.schemas, *block.of.values()):
            for name, (annotation, _) in schema.parameters_of(fn).items():
                assert re.search("[a-z]", str(annotation)) and annotation is not object, (
                    path,
                    name,
                )


def test_checking_starts_no_backend(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    return ConfigDict({'input': {'source': {'name': 'scenes'}}})\n"
    )
    program = (
        "import sys, jax\n"
        "from trainers.config import complete\n"
        "more = [('mesh.cpu_devices', '3'), ('objectives.contrastive.name', 'softmax')]\n"
        f"c = complete.load({str(path)!r}, more)\n"
        "assert c.model.txt.vocab_size is None and c.input.tokenizer.name == 'bytes'\n"
        "jax.config.update('jax_num_cpu_devices', c.mesh.cpu_devices)  # raises if one runs\n"
        "print(jax.device_count())\n"
    )
    done = processes.run([sys.executable, "-c", program])
    assert done.stdout.split()[-1:] == ["3"], done.stderr


def test_a_config_file_needs_nothing_but_ml_collections():
    program = (
        "import importlib, pathlib, sys\n"
        "for p in pathlib.Path('configs').glob('[!_]*.py'):\n"
        "    importlib.import_module(f'configs.{p.stem}').get_config\n"
        "ours = {'jax', 'trainers', 'siglip', 'input_pipeline', 'evaluators'} & set(sys.modules)\n"
        "assert not ours, ours\n"
    )
    processes.run([sys.executable, "-c", program])


def test_a_block_that_names_no_child_gets_the_initial_ones(config_file, monkeypatch):
    monkeypatch.setitem(
        schema.BLOCKS, "evals", Block(initial={"a": {"type": "loss"}, "b": {"type": "retrieval"}})
    )

    def evals(given, *overrides):
        given = {"input": {"source": {"name": "files", "path": "p"}}, "evals": given}
        return complete.locked(
            complete.completed(given, pathlib.Path(config_file), overrides)
        ).evals

    path = [(f"evals.{name}.source.path", "p") for name in "ab"]
    path += [(f"evals.{name}.source.name", "files") for name in "ab"]
    assert {name: e.type for name, e in evals({}, *path).items()} == {"a": "loss", "b": "retrieval"}
    changed = evals({}, *path, ("evals.a.type", "retrieval"))  # the other one stays
    assert {name: e.type for name, e in changed.items()} == dict.fromkeys("ab", "retrieval")
    one = {"c": {"type": "loss", "source": {"name": "files", "path": "p"}}}
    assert list(evals(one)) == ["c"]
