import sys

import processes
import pytest

from base import command_line
from base.errors import UserError


class Full(Exception):
    pass


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (UserError("no file a"), 2, "error: no file a"),
        (LookupError("no b"), 2, "error: no b"),
        (Full("a full\ndisk"), 1, "error: a full disk; run the same command again to go on"),
        (KeyboardInterrupt(), 85, "interrupted; run the same command again to go on"),
    ],
    ids=["user", "mistake", "failure", "ctrl-c"],
)
def test_an_error_is_a_line_and_a_code(raised, code, line, capsys):
    def main():
        raise raised

    assert command_line.run(main, mistakes=(LookupError,), failures=(Full,)) == code
    assert capsys.readouterr() == ("", line + "\n")


def test_the_code_of_main_is_kept_and_none_is_done():
    assert command_line.run(lambda: 87) == 87
    assert command_line.run(lambda: None) == 0


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        command_line.run(lambda: 1 // 0)
    with pytest.raises(BrokenPipeError):  # of another pipe than stdout

        def main():
            raise BrokenPipeError

        command_line.run(main)


@pytest.mark.parametrize("options", ["", "mistakes=(OSError,)", "failures=(OSError,)"])
def test_a_reader_that_has_gone_is_one_line(options):
    code = (
        "import sys; from base import command_line\n"
        f"sys.exit(command_line.run(lambda: print('x' * 100_000), {options}))"
    )
    shell = f'{sys.executable} -c "$CODE" | true; echo ${{PIPESTATUS[0]}}'
    done = processes.run(["bash", "-c", shell], env={"CODE": code, "PATH": "/usr/bin:/bin"})
    assert done.stdout == "1\n"
    assert done.stderr == "error: the reader of the output has gone, as after `| head`\n"


def test_what_cannot_be_parsed_is_a_users_mistake():
    parser = command_line.Parser(prog="x")
    parser.add_argument("--count", type=int)
    for argv in (["--count", "a"], ["--other"], ["--cou", "1"]):
        with pytest.raises(UserError, match=r"; see --help$"):
            parser.parse_args(argv)


def test_overrides_are_split_from_other_arguments_in_order():
    argv = (
        "--config=a.py --config.lr 0.1 --workdir w --config.b_init -10 --config.scan --noconfig.x"
    )
    argv = [*argv.split(), "--config.t=", "--config.m=a=b c"]
    overrides, rest = command_line.split_overrides(argv)
    assert rest == ["--config=a.py", "--workdir", "w"]
    assert overrides == [
        ("lr", "0.1"),
        ("b_init", "-10"),
        ("scan", "true"),
        ("x", "false"),
        ("t", ""),
        ("m", "a=b c"),
    ]
