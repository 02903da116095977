"""What a bare machine is told, and that CI leaves nothing out."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="make and sh are not there")


def fake_python(folder: Path, name: str, version: str, *, venv: bool = True) -> None:
    """Write a Python of that version, with or without what makes virtual environments."""
    major, minor = version.split(".")
    path = folder / name
    path.write_text(
        "#!/bin/sh\n"
        'case "$2" in\n'
        f"*ensurepip*) exit {0 if venv else 1} ;;\n"
        f"*sys.exit*) [ {major} -gt 3 ] || [ {minor} -ge 11 ] ;;\n"
        f"*) echo {version} ;;\n"
        "esac\n"
    )
    path.chmod(0o755)


def found(folder: Path) -> str:
    answer = subprocess.run(
        ["/bin/sh", ROOT / ".ci" / "find-python"],
        env={"PATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stderr == ""
    assert answer.stdout.count("\n") == 1
    return answer.stdout.strip()


def test_the_newest_python_is_taken(tmp_path: Path) -> None:
    fake_python(tmp_path, "python3", "3.11")
    fake_python(tmp_path, "python3.11", "3.11")
    fake_python(tmp_path, "python3.13", "3.13")
    assert found(tmp_path) == f"python {tmp_path}/python3.13"


def test_a_newer_python_that_makes_no_virtual_environment_is_passed_over(tmp_path: Path) -> None:
    fake_python(tmp_path, "python3.13", "3.13", venv=False)
    fake_python(tmp_path, "python3", "3.12")
    assert found(tmp_path) == f"python {tmp_path}/python3"


def test_a_missing_python_is_named(tmp_path: Path) -> None:
    assert found(tmp_path) == "Python 3.11 or newer is missing: sudo apt install python3 python3-venv"


def test_a_python_that_is_too_old_is_named(tmp_path: Path) -> None:
    fake_python(tmp_path, "python3", "3.9")
    assert found(tmp_path).startswith("Python 3.11 or newer is missing (found 3.9): ")


@pytest.mark.parametrize("name", ["python3", "python3.12"])
def test_a_missing_venv_is_named_with_its_package(tmp_path: Path, name: str) -> None:
    """The package of the distribution's own Python has no version in its name."""
    fake_python(tmp_path, name, "3.12", venv=False)
    assert found(tmp_path) == f"{name}-venv is missing: sudo apt install {name}-venv"


def test_the_distributions_own_python_is_known_by_both_names(tmp_path: Path) -> None:
    fake_python(tmp_path, "python3", "3.12", venv=False)
    fake_python(tmp_path, "python3.12", "3.12", venv=False)
    assert found(tmp_path) == "python3-venv is missing: sudo apt install python3-venv"


@pytest.mark.skipif(not shutil.which("make"), reason="make is not there")
def test_make_names_what_is_missing_in_one_line_and_leaves_nothing_behind(tmp_path: Path) -> None:
    tools, copy = tmp_path / "bin", tmp_path / "copy"
    tools.mkdir()
    for name in ("sh", "make"):
        (tools / name).symlink_to(str(shutil.which(name)))
    fake_python(tools, "python3", "3.11", venv=False)
    (copy / ".ci").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", ".ci/find-python"):
        shutil.copy(ROOT / name, copy / name)
    answer = subprocess.run(
        ["make", "test"], cwd=copy, env={"PATH": str(tools)}, capture_output=True, text=True
    )
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr.count("\n") == 1
    assert "python3-venv is missing: sudo apt install python3-venv" in answer.stderr
    assert not (copy / ".venv").exists()


PROGRAMS = ["promtool", "prometheus", "prometheus-alertmanager", "amtool"]
DEBIAN = {
    "12": {"prometheus": PROGRAMS[:2], "prometheus-alertmanager": PROGRAMS[2:]},
    "13": {
        "promtool": PROGRAMS[:1],
        "prometheus": PROGRAMS[1:2],
        "prometheus-alertmanager": PROGRAMS[2:],
    },
}


def fake_archive(folder: Path, packages: dict[str, list[str]], *, listed: bool) -> None:
    """Write an apt-get that knows these packages, listed: before its first update too."""
    archive, tools = folder / "archive", folder / "bin"
    for name, programs in packages.items():
        (archive / "usr/bin").mkdir(parents=True, exist_ok=True)
        for program in programs:
            (archive / "usr/bin" / program).write_text(f"#!/bin/sh\necho {program} 1.0\n")
            (archive / "usr/bin" / program).chmod(0o755)
        inside = [f"./usr/bin/{program}" for program in programs]
        subprocess.run(["tar", "-cf", archive / name, "-C", archive, *inside], check=True)
    if listed:
        (archive / "list").touch()
    fakes = {
        "apt-get": f'for last; do :; done; cd_to="{archive}"\n'
        'case "$*" in\n'
        '*update) : > "$cd_to/list" ;;\n'
        '*) [ -e "$cd_to/list" ] && cp "$cd_to/$last" "./${last}_1.0_amd64.deb" ;;\n'
        "esac\n",
        "dpkg-deb": 'cat "$2"\n',
        "cc": "",
        "id": "echo 0\n",
    }
    tools.mkdir()
    for name, text in fakes.items():
        (tools / name).write_text("#!/bin/sh\n" + text)
        (tools / name).chmod(0o755)
    for name in ("sh", "cat", "cp", "dirname", "head", "mkdir", "mktemp", "mv", "rm", "tail", "tar"):
        (tools / name).symlink_to(str(shutil.which(name)))


def get_tools(folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / ".ci").mkdir(exist_ok=True)
    shutil.copy(ROOT / ".ci" / "get-tools", folder / ".ci" / "get-tools")
    return subprocess.run(
        [folder / ".ci" / "get-tools"],
        env={"PATH": str(folder / "bin"), "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "no list yet"])
@pytest.mark.parametrize("debian", DEBIAN)
def test_tools_are_found_in_whichever_package_has_them(tmp_path: Path, debian: str, listed: bool) -> None:
    fake_archive(tmp_path, DEBIAN[debian], listed=listed)
    answer = get_tools(tmp_path)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.splitlines()[1:] == [f"tools: {program} 1.0" for program in PROGRAMS]
    assert sorted(path.name for path in (tmp_path / ".tools").iterdir()) == sorted(PROGRAMS)
    again = get_tools(tmp_path)
    assert again.stdout.splitlines()[1:] == [f"tools: {program} is there" for program in PROGRAMS]
    assert not list(tmp_path.glob("tmp*")), "nothing is left behind"


def test_a_tool_that_no_package_has_is_named(tmp_path: Path) -> None:
    fake_archive(tmp_path, {"prometheus": ["prometheus"]}, listed=True)
    answer = get_tools(tmp_path)
    assert answer.returncode == 1
    assert answer.stderr.count("\n") == 1
    assert answer.stderr.startswith("promtool is missing and no package has it (")


@pytest.mark.parametrize(("ci", "failed"), [("true", True), ("", False)])
def test_a_skip_is_a_failure_in_ci_only(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, ci: str, failed: bool
) -> None:
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    pytester.makepyfile(
        test_some="""
        import pytest

        def test_left_out():
            pytest.skip("no promtool")

        @pytest.mark.skip(reason="marked")
        def test_marked():
            pass

        @pytest.mark.xfail
        def test_known_to_fail():
            assert False

        def test_good():
            pass
        """,
        test_whole="""
        import pytest

        pytest.skip("no module", allow_module_level=True)
        """,
    )
    monkeypatch.setenv("CI", ci)
    result = pytester.runpytest_inprocess(
        "-p", "no:cacheprovider", "-p", "no:asyncio", "--continue-on-collection-errors"
    )
    if failed:
        result.assert_outcomes(passed=1, failed=1, errors=2, xfailed=1)
        text = result.stdout.str()
        assert "test_left_out was skipped, which is a failure in CI: no promtool" in text
        assert "test_marked was skipped, which is a failure in CI: marked" in text
        assert "test_whole.py was skipped, which is a failure in CI: no module" in text
    else:
        result.assert_outcomes(passed=1, skipped=3, xfailed=1)
