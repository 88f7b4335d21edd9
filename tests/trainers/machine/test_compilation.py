"""Flags and the cache of compiled programs."""

import pathlib
import stat

import jax
import pytest

from trainers.machine import compilation


@pytest.fixture(autouse=True)
def restored():
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_flags_of_the_user_come_last_and_win():
    environ = {"XLA_FLAGS": "--mine=1"}
    compilation.set_flags(environ, cpu_devices=4, nvidia=False)
    assert environ["XLA_FLAGS"] == f"{compilation.COLLECTIVE_TIMEOUT} --mine=1"
    environ = {}
    compilation.set_flags(environ, cpu_devices=0, nvidia=True)
    assert environ["XLA_FLAGS"] == compilation.LATENCY_HIDING


def test_programs_are_kept_where_only_the_user_can_write(tmp_path):
    folder = compilation.keep_programs({"XDG_CACHE_HOME": str(tmp_path)})
    assert folder is not None and folder.is_relative_to(tmp_path)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert jax.config.jax_compilation_cache_dir == str(folder)


def test_nothing_is_kept_in_a_folder_that_another_user_made(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation.os, "geteuid", lambda: 12345)
    assert compilation.keep_programs({"XDG_CACHE_HOME": str(tmp_path)}) is None
    monkeypatch.undo()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "siglip-jax").symlink_to(tmp_path / "elsewhere")
    assert compilation.keep_programs({"XDG_CACHE_HOME": str(tmp_path / "home")}) is None


def test_nothing_is_kept_where_the_user_said_so_or_nothing_can_be(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    assert compilation.keep_programs({"JAX_COMPILATION_CACHE_DIR": ""}) is None
    file = tmp_path / "file"
    file.write_text("")
    assert compilation.keep_programs({"XDG_CACHE_HOME": str(file)}) is None
    assert jax.config.jax_compilation_cache_dir == before


def test_machines_of_different_processors_do_not_share(monkeypatch, tmp_path):
    one = compilation._processor()
    monkeypatch.setattr(pathlib.Path, "read_text", lambda self: "flags : sse2\n")
    assert compilation._processor() != one
