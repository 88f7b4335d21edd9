"""Programs that run without this project: equal to the model, and refused where they are not."""

import dataclasses
import json
import re
import sys
import textwrap

import jax
import numpy as np
import processes
import pytest
from jax import export as jax_export

from siglip import export as exporting
from siglip.checkpoints import CheckpointError, Spec
from siglip.checkpoints.files import safetensors_file
from siglip.checkpoints.files.lazy_array import of_array
from siglip.checkpoints.formats import random_weights
from siglip.export import Options, export
from siglip.towers.vit import Patches

SQUARES = Spec(
    img={"variant": "mu/16"},
    txt={"variant": "mu", "vocab_size": 50, "out_dim": 32},
    res=32,
    token_len=8,
    vocab_size=50,
)
NAFLEX = dataclasses.replace(SQUARES, img={"variant": "mu/16", "naflex_grid": 4}, res=None)


@pytest.fixture(scope="module")
def weights():
    return random_weights.make(SQUARES, "squares")


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "new" / "exported"
    differences = export(weights, folder, Options())
    assert differences.keys() == {"image", "text"} and max(differences.values()) <= 1e-6
    return folder


def embed(weights, **inputs):
    """Of the Flax model, as it is."""
    return jax.jit(weights.spec.make_model().apply)({"params": weights.tree()}, **inputs)


def call(folder, name, *inputs):
    program = jax_export.deserialize(bytearray((folder / f"{name}.stablehlo").read_bytes()))
    leaves = safetensors_file.read(folder / f"{name}.safetensors")
    return program.call({n: leaf.read() for n, leaf in leaves.items()}, *inputs)


def inputs(n, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(256, size=(n, 32, 32, 3), dtype=np.uint8)
    return images, rng.integers(50, size=(n, 8), dtype=np.int32)


def patches(n, l, seed=0):
    """Of images of other sides each; what fills up is noise, which must not matter."""
    rng = np.random.default_rng(seed)
    rows = 1 + np.arange(n) % 3
    shape = np.stack([rows, l // rows], axis=1).astype(np.int32)
    mask = np.arange(l) < shape.prod(axis=1, keepdims=True)
    return rng.integers(256, size=(n, l, 768), dtype=np.uint8), mask, shape


def test_the_readme_runs_with_jax_alone_and_equals_the_model_for_any_batch(
    weights, folder, tmp_path
):
    readme = (folder / "README.txt").read_text()
    code = textwrap.dedent("\n".join(x for x in readme.splitlines() if x.startswith("    ")))
    for n in (1, 5):
        images, texts = inputs(n)
        np.savez(tmp_path / f"{n}.npz", images=images, texts=texts)
    program = f"""
import sys
import numpy as np
for n in (1, 5):
    given = np.load(rf"{tmp_path}/{{n}}.npz")
    images, texts = given["images"], given["texts"]
{textwrap.indent(code, "    ")}
    np.savez(rf"{tmp_path}/out{{n}}.npz", zimg=zimg, ztxt=ztxt, logits=logits)
print(sorted({{"siglip", "flax", "ml_dtypes"}} & {{m.partition(".")[0] for m in sys.modules}}))
"""
    # Isolated: neither PYTHONPATH nor the folder of the call is looked into for modules.
    ran = processes.run([sys.executable, "-I", "-c", program], cwd=folder)
    assert ran.stdout.strip() == "['ml_dtypes']"  # which is jax's own
    for n in (1, 5):
        images, texts = inputs(n)
        zimg, ztxt, scalars = embed(weights, image=images, text=texts)
        out = np.load(tmp_path / f"out{n}.npz")
        np.testing.assert_allclose(out["zimg"], zimg, rtol=0, atol=1e-6)
        np.testing.assert_allclose(out["ztxt"], ztxt, rtol=0, atol=1e-6)
        logits = scalars["t"] * zimg @ ztxt.T + scalars["b"]
        np.testing.assert_allclose(out["logits"], logits, rtol=0, atol=2e-4)


def test_the_folder_says_what_the_model_must_be_given(weights, folder):
    assert exporting.contract.load(folder / "siglip.json") == weights.spec
    scalars = json.loads((folder / "scalars.json").read_text())
    params = weights.tree()
    assert scalars["t"] == pytest.approx(np.exp(params["t"][0]), rel=1e-6)
    assert scalars["b"] == pytest.approx(params["b"][0], rel=1e-6)
    readme = (folder / "README.txt").read_text()
    assert "uint8[n, 32, 32, 3] -> float32[n, 32]" in readme
    assert "int32[n, 8] -> float32[n, 32]" in readme
    assert "for cpu, cuda, tpu" in readme


def test_naflex_takes_any_number_of_patches(tmp_path):
    weights = random_weights.make(NAFLEX, "naflex")
    export(weights.only("img"), tmp_path / "x", Options())
    assert "(values, mask, shape)" in (tmp_path / "x" / "README.txt").read_text()
    given = patches(4, 20)
    zimg, _, _ = embed(weights, image=Patches(*given))
    np.testing.assert_allclose(call(tmp_path / "x", "image", *given), zimg, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tower, name", [("img", "image"), ("txt", "text")])
def test_one_tower_is_exported_alone(weights, tower, name, tmp_path):
    differences = export(weights.only(tower), tmp_path / "x", Options())
    assert list(differences) == [name]
    assert {file.name for file in (tmp_path / "x").iterdir()} == {
        f"{name}.stablehlo", f"{name}.mlir", f"{name}.safetensors", "siglip.json", "README.txt",
    }  # fmt: skip
    images, texts = inputs(2)
    zimg, ztxt, _ = embed(weights, image=images, text=texts)
    got = call(tmp_path / "x", name, images if tower == "img" else texts)
    np.testing.assert_allclose(got, zimg if tower == "img" else ztxt, rtol=0, atol=1e-6)


def test_embeddings_that_are_data_leave_the_text_tower_and_the_scalars(tmp_path):
    made = dataclasses.replace(SQUARES, img={"variant": "precomputed", "width": 32}, bias=False)
    export(random_weights.make(made), tmp_path / "x", Options())
    names = {file.name for file in (tmp_path / "x").iterdir()}
    assert "text.stablehlo" in names and "image.stablehlo" not in names
    assert json.loads((tmp_path / "x" / "scalars.json").read_text())["b"] == 0


def test_floats_are_taken_as_values_from_minus_one_to_one(weights, tmp_path):
    export(weights.only("img"), tmp_path / "x", Options(pixels="float32"))
    images, _ = inputs(2)
    floats = images.astype(np.float32) / 127.5 - 1
    zimg, _, _ = embed(weights, image=images)
    np.testing.assert_allclose(call(tmp_path / "x", "image", floats), zimg, rtol=0, atol=1e-6)


# What is inside


def deserialized(folder, name):
    return jax_export.deserialize(bytearray((folder / f"{name}.stablehlo").read_bytes()))


def matmuls(program):
    text = program.mlir_module()
    return [x for x in text.splitlines() if re.search(r"stablehlo\.(dot_general|convolution)\b", x)]


@pytest.mark.parametrize("name", ["image", "text"])
def test_a_program_is_for_any_batch_on_the_platforms_named(folder, name):
    program = deserialized(folder, name)
    assert program.platforms == ("cpu", "cuda", "tpu")
    *_, given = program.in_avals
    assert str(given.shape[0]) == "n" and str(program.out_avals[0].shape) == "(n, 32)"
    # No array of weights inside: as an argument it can be of any size, and replaced.
    assert (folder / f"{name}.stablehlo").stat().st_size < 100_000
    # float32 is float32 on every platform.
    assert matmuls(program) and all(x.count("HIGHEST") == 2 for x in matmuls(program))


def test_bfloat16_is_of_matmuls_and_platforms_are_those_asked_for(weights, tmp_path):
    options = Options(dtype="bfloat16", platforms=("cpu", "rocm"))
    export(weights, tmp_path / "x", options)
    program = deserialized(tmp_path / "x", "image")
    assert program.platforms == ("cpu", "rocm")
    assert {str(x.dtype) for x in program.in_avals[:-1]} == {"float32"}
    assert matmuls(program) and all("xbf16>" in line for line in matmuls(program))
    assert not any("HIGHEST" in line for line in matmuls(program))
    assert str(program.out_avals[0].dtype) == "float32"


@pytest.mark.parametrize("batch, text", [(1, False), (2, True)])
def test_the_mlir_runs_without_jax_export(weights, batch, text, tmp_path):
    from jaxlib import xla_client

    export(weights, tmp_path / "x", Options(batch=batch, text=text))
    device = jax.devices()[0]
    for name, given in zip(("image", "text"), inputs(batch)):
        module = (tmp_path / "x" / f"{name}.mlir").read_bytes()
        assert module.startswith(b"ML\xefR") != text  # MLIR's bytecode
        assert b"custom_call" not in module
        leaves = safetensors_file.read(tmp_path / "x" / f"{name}.safetensors")
        arguments = [leaves[n].read() for n in sorted(leaves)] + [given]
        program = device.client.compile_and_load(
            module, xla_client.DeviceList((device,)), xla_client.CompileOptions()
        )
        out = program.execute_sharded([jax.device_put(x, device) for x in arguments])
        ((z,),) = out.disassemble_into_single_device_arrays()
        expected = embed(weights, **{name: given})[0 if name == "image" else 1]
        np.testing.assert_allclose(z, expected, rtol=0, atol=1e-6)


# What is refused


def damaged_array(monkeypatch):
    write = safetensors_file.write

    def wrong(path, leaves, metadata):
        name = next(n for n in leaves if n.endswith("kernel"))
        array = leaves[name].read() * np.float32(1.001)
        write(path, {**leaves, name: of_array(array)}, metadata)

    monkeypatch.setattr(safetensors_file, "write", wrong)


def other_program(monkeypatch):
    right = exporting.exported_program

    def wrong(*arguments):
        program = right(*arguments)
        return jax.jit(lambda arrays, *inputs: program(arrays, *inputs) * (1 + 1e-5))

    monkeypatch.setattr(exporting, "exported_program", wrong)


def no_number(monkeypatch):
    right = exporting.exported_program

    def wrong(*arguments):
        program = right(*arguments)
        return jax.jit(lambda arrays, *inputs: program(arrays, *inputs) * np.float32("nan"))

    monkeypatch.setattr(exporting, "exported_program", wrong)


@pytest.mark.parametrize("damage", [damaged_array, other_program, no_number])
def test_what_is_not_equal_to_the_model_is_not_left_there(weights, damage, monkeypatch, tmp_path):
    damage(monkeypatch)
    with pytest.raises(CheckpointError, match=r"tower differs from the model by .*, more than 1e-"):
        export(weights, tmp_path / "x", Options())
    assert not list(tmp_path.iterdir())


def test_a_larger_batch_is_compared_too(weights, monkeypatch, tmp_path):
    right = exporting.exported_program

    def wrong(*arguments):  # every row is the first one's
        program = right(*arguments)

        def first(arrays, *inputs):
            z = program(arrays, *inputs)
            return z[:1] + 0 * z

        return jax.jit(first)

    monkeypatch.setattr(exporting, "exported_program", wrong)
    with pytest.raises(CheckpointError, match="differs from the model"):
        export(weights.only("txt"), tmp_path / "x", Options())


def test_weights_that_are_no_numbers_are_refused(weights, tmp_path):
    name = "txt/head/bias"
    nan = of_array(np.full(weights.arrays[name].shape, np.nan, np.float32))
    broken = dataclasses.replace(weights, arrays={**weights.arrays, name: nan})
    with pytest.raises(CheckpointError, match="text embeddings are not finite numbers"):
        export(broken, tmp_path / "x", Options())
    assert not list(tmp_path.iterdir())


def test_weights_of_another_model_are_refused_with_a_diff(weights, tmp_path):
    leaves = {n: leaf for n, leaf in weights.arrays.items() if n != "txt/head/bias"}
    with pytest.raises(CheckpointError, match=r"1 missing there: txt/head/bias \[32\]"):
        export(dataclasses.replace(weights, arrays=leaves), tmp_path / "x", Options())


SOURCE = "random:siglip-b16-224:small"


@pytest.mark.parametrize(
    "arguments, told",
    [
        ([SOURCE, "there"], "there is there already"),
        ([SOURCE, "x", "--platforms", "cpu,gpu"], "platform 'gpu' is none of cpu, cuda, rocm, tpu"),
        ([SOURCE, "x", "--platforms", "cuda"], "platforms lack cpu"),
        ([SOURCE, "x", "--batch", "0"], "batch must be at least 1, not 0"),
        (["random:nothing", "x"], "random:nothing"),
        (["nothing.npz", "x"], "nothing.npz: there is no such file"),
    ],
    ids=["exists", "platform", "no cpu", "batch", "preset", "file"],
)
def test_a_mistake_is_one_line(arguments, told, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert exporting.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error and error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("flag", [["--dtype", "float16"], ["--pixels", "int8"], ["--no_flag"]])
def test_a_mistaken_flag_is_one_line(flag, capsys):
    assert exporting.main([SOURCE, "x", *flag]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_pixels_of_another_type_are_refused(weights, tmp_path):
    with pytest.raises(ValueError, match="pixels 'int8' is none of uint8, float32"):
        export(weights, tmp_path / "x", Options(pixels="int8"))


def test_a_missing_package_or_a_gpu_are_one_line(weights, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match="needs the package flatbuffers: pip install"):
            export(weights, tmp_path / "x", Options())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="not on gpu: set JAX_PLATFORMS=cpu"):
        export(weights, tmp_path / "x", Options())


def test_the_program_says_how_equal_it_is(tmp_path, capsys):
    target = tmp_path / "exported"
    assert exporting.main([SOURCE, str(target), "--only", "txt", "--text"]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"^text: read back, it differs from the model by at most \d\.\de[-+]\d\d\n", out
    )
    assert "image" not in out and (target / "text.mlir").read_text().lstrip().startswith("#loc")
