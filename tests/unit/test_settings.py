"""Written values are read strictly; what is refused is named, without a secret and with a way out."""

from __future__ import annotations

import pytest

from kvscope import settings as written
from kvscope.settings import Address, ServerSettings, Settings, SettingsError


@pytest.mark.parametrize(
    ("text", "name", "address"),
    [
        ("http://127.0.0.1:8080", None, Address("http://127.0.0.1:8080")),
        ("main=http://127.0.0.1:8080/", "main", Address("http://127.0.0.1:8080")),
        ("gpu-2=https://llama.example.org/a/b", "gpu-2", Address("https://llama.example.org/a/b")),
        ("v6=http://[::1]:8080", "v6", Address("http://[::1]:8080")),
        ("http://h:1/a=b", None, Address("http://h:1/a=b")),
        ("s=unix:/run/llama.sock", "s", Address("http://localhost", "/run/llama.sock")),
        ("unix:/run/llama.sock:/v/", None, Address("http://localhost/v", "/run/llama.sock")),
    ],
)
def test_a_server_is_a_name_and_a_url_or_a_socket(text: str, name: str | None, address: Address) -> None:
    assert written.server_and_address(text) == (name, address)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "main",
        "main=",
        "=http://h:1",
        "main=h:8080",
        "main=ftp://h:1",
        "main=http://",
        "main=http://h:0",
        "main=http://h:65536",
        "main=http://h:port",
        "main=http://h:1?model=a",
        "main=http://h:1#a",
        "main=http://h :1",
        "main=http://h\n:1",
        "main=http://[::1",
        "na me=http://h:1",
        "a" * 65 + "=http://h:1",
        "main=unix:run/llama.sock",
        "main=unix:",
        "main=unix:/run/a.sock:prefix",
        "main=unix:/" + "a" * 107,
    ],
)
def test_a_server_that_cannot_be_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        written.server_and_address(text)
    assert "\n" not in str(refusal.value)
    assert "write" in str(refusal.value) or "must" in str(refusal.value) or "end it" in str(refusal.value)


@pytest.mark.parametrize(
    "text",
    [
        "main=http://user:CANARY@h:1",
        "main=http://CANARY@h:1",
        "main=http://u:CAN/CANARY@h:1",
        "main=htp://u:CANARY@h:1",
        "main=u:CANARY@h:1",
        "http://u:CANARY@h:1",
        "main=http://u:CANARY@h:99999",
        "main=http://u:CANARY@h:1/a b",
        "main=http://h:1?api_key=CANARY",
        "main=http://h:x?api_key=CANARY",
        "main=unix:/run/a.sock:/v?key=CANARY",
    ],
)
def test_no_credential_in_a_url_is_repeated(text: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        written.server_and_address(text)
    assert "CANARY" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:10188", ("127.0.0.1", 10188)),
        ("[::1]:1", ("::1", 1)),
        ("localhost:65535", ("localhost", 65535)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
    ],
)
def test_a_listen_address_is_host_and_port(text: str, address: tuple[str, int]) -> None:
    assert written.listen_address(text) == address


@pytest.mark.parametrize(
    "text",
    ["", "10188", "localhost", ":10188", "h:-1", "h:65536", "h:1.5", "h:²", "::1:80", "http://h:1", "h h:1"],
)
def test_a_listen_address_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(SettingsError):
        written.listen_address(text)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_loopback_is_known(host: str) -> None:
    assert written.is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_what_others_reach_is_not_loopback(host: str) -> None:
    assert not written.is_loopback(host)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", "", "1e9", "0.001"])
def test_an_interval_must_be_a_possible_number_of_seconds(value: str) -> None:
    with pytest.raises(SettingsError, match="seconds"):
        written.interval_seconds(value)


@pytest.mark.parametrize(
    ("text", "expected"), [("auto", (None, "auto")), ("main=off", ("main", "off")), ("a=300", ("a", 300.0))]
)
def test_sleep_idle_is_auto_off_or_seconds(text: str, expected: tuple[str | None, str | float]) -> None:
    assert written.sleep_idle_of_server(text) == expected


@pytest.mark.parametrize("text", ["on", "0", "-1", "main=nan", "main=", "main=never", "="])
def test_sleep_idle_refuses_anything_else(text: str) -> None:
    with pytest.raises(SettingsError):
        written.sleep_idle_of_server(text)


def test_a_header_is_a_name_and_a_value() -> None:
    assert written.header_of_server("main=X-Team: blue: and red") == ("main", ("X-Team", "blue: and red"))


@pytest.mark.parametrize(
    "text",
    [
        "main=X-Team: CANARY\r\nEvil: 1",
        "main=X-Team: CANARY\x00",
        "main=X-Team: CANARYé",
        "main=CANARY",
        "main=CANARY X: 1",
        "Authorization: Bearer CANARY=",
        "CANARY",
        "CANARY==",
    ],
)
def test_a_header_that_http_cannot_carry_is_refused_without_its_value(text: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        written.header_of_server(text)
    assert "CANARY" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_key_is_the_first_line_that_holds_one() -> None:
    assert written.api_key("\n  first-key \r\nsecond-key\n", "key file k") == "first-key"


@pytest.mark.parametrize("text", ["", "\n \n", "CANARY two", "CANARYé", "CANARY\x07"])
def test_a_key_that_cannot_be_is_refused_without_a_word_of_it(text: str) -> None:
    with pytest.raises(SettingsError, match="key file k") as refusal:
        written.api_key(text, "key file k")
    assert "CANARY" not in str(refusal.value)


def test_a_servers_key_variable_is_upper_case_with_underscores() -> None:
    assert written.key_variable("gpu-2.b") == "KVSCOPE_API_KEY_GPU_2_B"


def test_a_name_whose_key_variable_has_another_use_is_refused() -> None:
    with pytest.raises(SettingsError, match="rename"):
        written.server_name("File")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (Settings(servers=()), "--server"),
        (Settings(servers=(ServerSettings("a"), ServerSettings("a"))), "twice"),
        (Settings(servers=(ServerSettings("a-b"), ServerSettings("c"), ServerSettings("A_B"))), "A_B"),
        (Settings(busy_interval_seconds=5.0), "--idle-interval"),
        (
            Settings(servers=(ServerSettings("a", api_key="k", headers={"authorization": "Bearer k"}),)),
            "Authorization",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: Settings, named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        written.refuse_impossible(settings)


def test_the_defaults_go_together() -> None:
    written.refuse_impossible(Settings())


def test_neither_key_nor_header_is_in_the_settings_text_form() -> None:
    server = ServerSettings("main", api_key="CANARY", headers={"X-Key": "CANARY"})
    assert "CANARY" not in repr(Settings(servers=(server,)))
