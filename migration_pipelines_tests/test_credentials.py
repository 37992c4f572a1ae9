"""Where secrets come from, in which order, and that nothing on the way repeats one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from migration_pipelines import credentials
from migration_pipelines.credentials import read_env_file, refer, secret
from migration_pipelines.declarations import with_environment
from migration_pipelines.errors import ConfigurationError
from migration_pipelines.redaction import redacted
from migration_pipelines.store import open_address

SECRET = "s3cret-planted-here"
PRINTS = f'{sys.executable} -c \'print("{SECRET}"); print("and a note")\''
# Every variable that a store reads a secret from, an address that reads it, and the field that gets it.
STORES = {
    "CHROMA_TOKEN": ("chroma://host/c", "token"),
    "ELASTICSEARCH_API_KEY": ("elasticsearch://host/c", "api_key"),
    "ELASTICSEARCH_PASSWORD": ("elasticsearch://u@host/c", "password"),
    "MILVUS_PASSWORD": ("milvus://u@host/c", "password"),
    "MILVUS_TOKEN": ("milvus://host/c", "token"),
    "PGPASSWORD": ("pgvector://u@host/db/c", "password"),
    "PGVECTOR_PASSWORD": ("pgvector://u@host/db/c", "password"),
    "PINECONE_API_KEY": ("pinecone://c", "api_key"),
    "QDRANT_API_KEY": ("qdrant://host/c", "api_key"),
    "WEAVIATE_API_KEY": ("weaviate://host/C", "api_key"),
}


@pytest.fixture(autouse=True)
def environment() -> Iterator[dict[str, str]]:
    """An environment of the test's own, with none of these secrets in it."""
    with mock.patch.dict("os.environ") as found:
        for name in [
            name for name in found if name.startswith(tuple(STORES)) or name == credentials.EVERYWHERE
        ]:
            del found[name]
        yield found


@pytest.fixture
def entries() -> Iterator[dict[tuple[str, str], str]]:
    """The library `keyring` over a keyring of the test's own."""
    keyring = pytest.importorskip("keyring")
    from keyring.backend import KeyringBackend

    held: dict[tuple[str, str], str] = {}

    class Held(KeyringBackend):
        priority = 1

        def get_password(self, service: str, username: str) -> str | None:
            return held.get((service, username))

        def set_password(self, service: str, username: str, password: str) -> None:
            raise AssertionError("secrets are only read")

    before = keyring.get_keyring()
    keyring.set_keyring(Held())
    yield held
    keyring.set_keyring(before)


# ── every store ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("variable", STORES)
def test_a_store_gets_its_secret_from_a_command_as_from_its_variable(
    variable: str, environment: dict[str, str]
) -> None:
    address, field = STORES[variable]
    for name, value in ((variable, SECRET), (f"{variable}_COMMAND", PRINTS)):
        with mock.patch.dict(environment, {name: value}):
            store, _ = open_address(address)
        assert getattr(store, field).get_secret_value() == SECRET
        assert SECRET not in store.address() + repr(store)


def test_a_declared_connection_gets_it_the_same_way(environment: dict[str, str]) -> None:
    environment["PGVECTOR_PASSWORD_COMMAND"] = PRINTS
    assert with_environment({"password": "{{ env.PGVECTOR_PASSWORD }}"}, "here") == {"password": SECRET}


# ── order ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_variable_goes_before_the_command_and_that_before_the_keyring(
    environment: dict[str, str], entries: dict[tuple[str, str], str]
) -> None:
    entries["team", "db"], entries["vector-migrate", "QDRANT_API_KEY"] = "of the team", "by its variable"
    assert secret("QDRANT_API_KEY") == ""
    environment["VECTOR_MIGRATE_SECRETS"] = "keyring"
    assert secret("QDRANT_API_KEY") == "by its variable"
    environment["QDRANT_API_KEY_KEYRING"] = "team/db"
    assert secret("QDRANT_API_KEY") == "of the team"
    environment["QDRANT_API_KEY_COMMAND"] = PRINTS
    assert secret("QDRANT_API_KEY") == SECRET
    environment["QDRANT_API_KEY"] = "plain"
    assert secret("QDRANT_API_KEY") == "plain"


def test_the_first_variable_that_is_found_anywhere_counts(environment: dict[str, str]) -> None:
    environment |= {"PGPASSWORD": "other", "PGVECTOR_PASSWORD_COMMAND": PRINTS}
    assert secret("PGVECTOR_PASSWORD", "PGPASSWORD") == SECRET


def test_what_is_found_is_blacked_out(
    environment: dict[str, str], entries: dict[tuple[str, str], str]
) -> None:
    entries["team", "db"] = "kept-in-the-keyring"
    environment["QDRANT_API_KEY_KEYRING"] = "team/db"
    assert redacted(f"failed with {secret('QDRANT_API_KEY')}") == "failed with ***"


# ── commands ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (f"{sys.executable} -c 'import sys; print(\"{SECRET}\"); sys.exit(3)'", "exit status 3"),
        (f"{sys.executable} -c 'import sys; sys.stderr.write(\"{SECRET}\"); sys.exit(1)'", "exit status 1"),
        (f"{sys.executable} -c pass", "printed nothing"),
        (f"{sys.executable} -c 'import sys; sys.stdout.buffer.write(bytes([255]))'", "UTF-8"),
        ("not-a-command-at-all", "No such file"),
        ("echo 'unfinished", "quotes"),
    ],
)
def test_a_command_that_gives_no_secret_is_told_without_its_output(
    environment: dict[str, str], command: str, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    environment["QDRANT_API_KEY_COMMAND"] = command
    with pytest.raises(ConfigurationError, match="QDRANT_API_KEY_COMMAND") as raised:
        secret("QDRANT_API_KEY")
    assert words in str(raised.value)
    assert SECRET not in str(raised.value) + "".join(capfd.readouterr())
    assert raised.value.__cause__ is None


def test_a_command_is_run_without_a_shell(environment: dict[str, str], tmp_path: Path) -> None:
    environment["QDRANT_API_KEY_COMMAND"] = f"echo $HOME; touch {tmp_path}/made"
    assert secret("QDRANT_API_KEY") == f"$HOME; touch {tmp_path}/made"
    assert not (tmp_path / "made").exists()


def test_a_command_that_hangs_is_given_up(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "_COMMAND_SECONDS", 0.2)
    environment["QDRANT_API_KEY_COMMAND"] = "sleep 60"
    with pytest.raises(ConfigurationError, match=r"within 0\.2 s"):
        secret("QDRANT_API_KEY")


def test_a_command_is_run_once_a_process(environment: dict[str, str], tmp_path: Path) -> None:
    environment["QDRANT_API_KEY_COMMAND"] = (
        f'{sys.executable} -c \'open("{tmp_path}/runs", "a").write("x"); print(1234)\''
    )
    assert [secret("QDRANT_API_KEY"), secret("QDRANT_API_KEY")] == ["1234", "1234"]
    assert (tmp_path / "runs").read_text() == "x"


# ── keyring ──────────────────────────────────────────────────────────────────────────────────────────


def test_an_entry_that_is_not_there_says_how_to_make_it(
    environment: dict[str, str], entries: dict[tuple[str, str], str]
) -> None:
    environment["QDRANT_API_KEY_KEYRING"] = "my team/db"
    with pytest.raises(ConfigurationError, match="keyring set 'my team' db"):
        secret("QDRANT_API_KEY")


def test_a_keyring_that_is_locked_is_told(environment: dict[str, str], entries: object) -> None:
    import keyring
    from keyring.errors import KeyringLocked

    environment["VECTOR_MIGRATE_SECRETS"] = "keyring"
    with (
        mock.patch.object(type(keyring.get_keyring()), "get_password", side_effect=KeyringLocked(SECRET)),
        pytest.raises(ConfigurationError, match="KeyringLocked") as raised,
    ):
        secret("QDRANT_API_KEY")
    assert SECRET not in str(raised.value)


def test_without_the_library_the_extra_is_named(environment: dict[str, str]) -> None:
    environment["QDRANT_API_KEY_KEYRING"] = "team/db"
    with mock.patch.dict(sys.modules, keyring=None), pytest.raises(ConfigurationError, match=r"\[keyring\]"):
        secret("QDRANT_API_KEY")


def test_a_place_for_secrets_that_is_not_known_is_refused(environment: dict[str, str]) -> None:
    environment["VECTOR_MIGRATE_SECRETS"] = "vault"
    with pytest.raises(ConfigurationError, match="VECTOR_MIGRATE_SECRETS is keyring"):
        secret("QDRANT_API_KEY")


# ── references, .env ─────────────────────────────────────────────────────────────────────────────────


def test_a_reference_goes_before_what_the_environment_has(environment: dict[str, str]) -> None:
    environment["QDRANT_API_KEY"] = "plain"
    refer("QDRANT_API_KEY", f"command:{PRINTS}")
    assert secret("QDRANT_API_KEY") == SECRET


def test_a_secret_in_place_of_a_reference_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigurationError, match="QDRANT_API_KEY") as raised:
        refer("QDRANT_API_KEY", SECRET)
    assert SECRET not in str(raised.value)


def test_an_env_file_fills_in_what_is_not_set(environment: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text(f"# local\nexport PGVECTOR_PASSWORD='{SECRET}'\nQDRANT_API_KEY=from-the-file\n")
    environment["QDRANT_API_KEY"] = "real"
    read_env_file(path, commands=False)
    assert (secret("PGVECTOR_PASSWORD"), secret("QDRANT_API_KEY")) == (SECRET, "real")


def test_an_env_file_that_was_only_found_runs_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text(f"QDRANT_API_KEY_COMMAND={PRINTS}\n")
    with pytest.raises(ConfigurationError, match="--env-file"):
        read_env_file(path, commands=False)
    read_env_file(path, commands=True)
    assert "QDRANT_API_KEY_COMMAND" in environment


def test_an_env_file_that_can_not_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, words in (("nope", "No such file"), ("binary", "UTF-8")):
        with pytest.raises(ConfigurationError, match=words):
            read_env_file(tmp_path / name, commands=False)
