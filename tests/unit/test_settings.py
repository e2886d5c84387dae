"""Settings: where values come from, and what is said about a bad one."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from penstock import errors, settings
from penstock.errors import ConfigurationError
from penstock.settings import Settings, load


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "project" / "deep").mkdir(parents=True)
    return tmp_path / "project"


def read(project: Path, **variables: str) -> Settings:
    home = {"PENSTOCK_HOME": str(project.parent / "home")}
    return load(
        {**home, **{f"PENSTOCK_{name}": value for name, value in variables.items()}}, project / "deep"
    )


def test_defaults(project: Path) -> None:
    found = read(project)
    assert found == Settings(home=project.parent / "home")
    assert (found.tasks_max_nesting, found.large_argument, found.tracking) == (2000, 1048576, "on")
    assert found.source("runner") == "default"
    assert load({}, project).home == Path("~/.penstock").expanduser()


def test_the_environment_wins_over_the_project_and_the_project_over_the_user(project: Path) -> None:
    (project / "pyproject.toml").write_text('[tool.penstock]\nrunner = "dask"\ntask_default_retries = 1\n')
    (project / "penstock.toml").write_text("task_default_retries = 2\n")
    user = project.parent / "home" / "penstock.toml"
    user.parent.mkdir()
    user.write_text('runner = "ray"\nflow_default_retries = 3\nlogging_log_prints = true\n')
    found = read(project, TASKS_MAX_NESTING="7")
    assert (found.runner, found.task_default_retries, found.flow_default_retries) == ("dask", 2, 3)
    assert found.logging_log_prints is True
    assert found.source("tasks_max_nesting") == "PENSTOCK_TASKS_MAX_NESTING"
    assert found.source("runner") == str(project / "pyproject.toml")
    assert found.source("task_default_retries") == str(project / "penstock.toml")
    assert found.source("flow_default_retries") == str(user)
    assert read(project, RUNNER="threads").runner == "threads"


def test_a_relative_home_in_a_file_is_relative_to_the_file(project: Path) -> None:
    (project / "penstock.toml").write_text('home = "record"\n')
    assert load({}, project / "deep").home == project / "record"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("LOGGING_LOG_PRINTS", "yes", True),
        ("LOGGING_LOG_PRINTS", "OFF", False),
        ("LARGE_ARGUMENT", "2 MiB", 2 << 20),
        ("LARGE_ARGUMENT", "64kB", 64000),
        ("LARGE_ARGUMENT", "0", 0),
        ("TRACKING", "false", "off"),
        ("SHARED_MEMORY", "Auto", "auto"),
        ("SHARED_MEMORY", "off", "off"),
        ("SHARED_MEMORY", "1", "auto"),
        ("SPOOL_SYNC", "Power", "power"),
        ("TASK_DEFAULT_RETRIES", " 3 ", 3),
        ("RUNNER", "", ""),
        ("TASKS_DEFAULT_PERSIST_RESULT", "", ""),
        ("TASKS_DEFAULT_PERSIST_RESULT", "Yes", "true"),
        ("TASKS_DEFAULT_PERSIST_RESULT", "large", "large"),
        ("DEBUG_MODE", "1", True),
        ("UI_URL", "https://flows.example.org", "https://flows.example.org"),
    ],
)
def test_text_becomes_values(project: Path, name: str, text: str, value: object) -> None:
    assert getattr(read(project, **{name: text}), name.lower()) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("TASKS_MAX_NESTING", "many"),
        ("TASKS_MAX_NESTING", "0"),
        ("TASK_DEFAULT_RETRIES", "-1"),
        ("LOGGING_LOG_PRINTS", "perhaps"),
        ("LARGE_ARGUMENT", "1 parsec"),
        ("TRACKING", "some"),
        ("SHARED_MEMORY", "some"),
        ("SPOOL_SYNC", "never"),
        ("RESULTS_PERSIST_BY_DEFAULT", "sometimes"),
        ("RESULTS_DEFAULT_SERIALIZER", "yaml"),
        ("TASKS_DEFAULT_PERSIST_RESULT", "sometimes"),
        ("DEBUG_MODE", "somewhat"),
    ],
)
def test_a_bad_value_gives_one_sentence_that_names_the_variable(project: Path, name: str, text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read(project, **{name: text})
    sentence = str(caught.value)
    assert sentence.startswith(f"PENSTOCK_{name} is '{text}', but must be ")
    assert "\n" not in sentence
    assert sentence.endswith(".")


def test_settings_of_stored_results(project: Path) -> None:
    found = read(project)
    assert (found.results_persist_by_default, found.default_result_storage) == ("false", "")
    assert found.results_default_serializer == "auto"
    found = read(project, RESULTS_PERSIST_BY_DEFAULT="yes", DEFAULT_RESULT_STORAGE="s3://bucket/x")
    assert (found.results_persist_by_default, found.default_result_storage) == ("true", "s3://bucket/x")
    found = read(project, RESULTS_PERSIST_BY_DEFAULT="large", DEFAULT_RESULT_STORAGE="kept")
    assert found.results_persist_by_default == "large"
    assert Path(found.default_result_storage).is_absolute()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("runer = 'dask'", "did you mean runner"),
        ("task_default_retries = 'x'", "task_default_retries in"),
        ("runner = [", "is not valid TOML"),
    ],
)
def test_a_bad_file_is_named(project: Path, text: str, says: str) -> None:
    (project / "penstock.toml").write_text(text)
    with pytest.raises(ConfigurationError, match=says) as caught:
        read(project)
    assert str(project / "penstock.toml") in str(caught.value)


def test_the_home_cannot_be_set_in_the_home(project: Path) -> None:
    (project.parent / "home").mkdir()
    (project.parent / "home" / "penstock.toml").write_text("home = '/elsewhere'")
    with pytest.raises(ConfigurationError, match="cannot be set there"):
        read(project)


def test_the_list_of_settings_masks_passwords(project: Path) -> None:
    rows = {
        name: (value, source)
        for name, value, source in read(project, DATABASE_URL="pg://u:pw@h/d").describe()
    }
    assert rows["PENSTOCK_DATABASE_URL"] == ("pg://u:***@h/d", "PENSTOCK_DATABASE_URL")
    assert rows["PENSTOCK_LOGGING_LOG_PRINTS"] == ("false", "default")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:p@w@h/d", "postgresql://u:***@h/d"),
        ("postgresql://u:p:w/x@h/d", "postgresql://u:***@h/d"),
        ("postgresql://u@h/d?password=pw&sslmode=require", "postgresql://u@h/d?password=***&sslmode=require"),
        ("sqlite:////tmp/x.db", "sqlite:////tmp/x.db"),
    ],
)
def test_no_password_is_shown(url: str, shown: str) -> None:
    assert settings.masked(url) == shown


def test_the_retention(project: Path) -> None:
    assert read(project).retention_days == 90.0
    assert read(project, RETENTION="36h").retention_days == 1.5
    assert read(project, RETENTION="Never").retention_days is None
    with pytest.raises(ConfigurationError, match="'90d', or 'never'"):
        read(project, RETENTION="soon")


def test_settings_are_read_once_and_anew_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    first = settings.settings()
    monkeypatch.setenv("PENSTOCK_RUNNER", "ray")
    assert settings.settings() is first
    assert settings.refresh().runner == "ray"
    assert settings.settings().runner == "ray"


def test_reading_settings_loads_no_library() -> None:
    script = "import sys, penstock.settings as s; s.settings(); print('pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_name_of_existing_scripts_is_a_setting() -> None:
    names = (
        "HOME API_URL UI_URL DATABASE_URL RUNNER TASKS_MAX_NESTING LOGGING_LOG_PRINTS RESULTS_PERSIST_BY_DEFAULT "
        "DEFAULT_RESULT_STORAGE RESULTS_DEFAULT_SERIALIZER TASKS_DEFAULT_PERSIST_RESULT TASKS_DEFAULT_NO_CACHE "
        "TASKS_DISABLE_CACHING TASKS_REFRESH_CACHE TASK_DEFAULT_RETRIES FLOW_DEFAULT_RETRIES DEBUG_MODE"
    )
    assert {name.lower() for name in names.split()} <= set(settings.NAMES)


def test_debug_mode_keeps_our_lines_in_tracebacks_and_lets_our_loggers_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lines() -> list[str]:
        from penstock import flow

        @flow
        def broken() -> None:
            raise ValueError("no data")

        with pytest.raises(ValueError, match="no data") as caught:
            broken()
        return [str(entry.path) for entry in caught.traceback]

    package = str(Path(errors.__file__).parent)
    assert not any(path.startswith(package) for path in lines())
    monkeypatch.setenv("PENSTOCK_DEBUG_MODE", "1")
    settings.refresh()
    assert any(path.startswith(package) for path in lines())
    assert logging.getLogger("penstock.runners.dask").isEnabledFor(logging.DEBUG)
    monkeypatch.delenv("PENSTOCK_DEBUG_MODE")
    settings.refresh()
    assert not any(path.startswith(package) for path in lines())
    assert not logging.getLogger("penstock.runners.dask").isEnabledFor(logging.DEBUG)
