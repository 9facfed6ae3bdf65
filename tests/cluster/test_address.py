"""Addresses as people write them, and what Ray is told for loopback and for nowhere else."""

import subprocess
import sys

import pytest
from comfyui_hywu.hywu_core.cluster.address import Address, environment
from comfyui_hywu.hywu_core.errors import ClusterError


@pytest.mark.parametrize(("text", "expected"), [
    ("127.0.0.1:6379", Address("127.0.0.1:6379")), (" 10.0.0.1:1 ", Address("10.0.0.1:1")), ("auto", Address("auto")),
    ("ray://rack:10001#night-2", Address("ray://rack:10001", "night-2")), ("auto#b_2", Address("auto", "b_2")),
    ("[::1]:6379", Address("[::1]:6379"))])
def test_addresses(text, expected):
    assert Address.parse(text) == expected


@pytest.mark.parametrize("text", ["", "local", "rack", "rack:", ":6379", "rack:port", "rack:0", "rack:70000", "auto#",
                                  "auto#a/b", "auto#a b", "http://"])
def test_what_is_none_is_refused_with_the_remedy(text):
    with pytest.raises(ClusterError, match=r"HOST:PORT|letters, digits"):
        Address.parse(text)


@pytest.fixture
def home(monkeypatch, tmp_path):
    """An empty home, and nothing said about Ray in the environment: what a new machine has."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
                 "RAY_worker_niceness"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path)
    return tmp_path


def test_loopback_alone_gets_settings(home, monkeypatch):
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("0" * 64)
    assert environment(Address("10.0.0.1:6379")) == {} == environment(Address("ray://rack:10001"))
    assert environment(Address("127.0.0.1:6379"))["RAY_AUTH_MODE"] == "token"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "RAY_AUTH_MODE" not in environment(Address("localhost:6379"))


def test_who_has_no_token_joins_without(home):
    """A cluster of one's own, started without tokens: Ray would refuse the mode."""
    found = environment(Address("127.0.0.1:6379"))
    assert found and "RAY_AUTH_MODE" not in found


def test_clients_and_nodes_do_not_import_ray():
    code = ("import sys; from comfyui_hywu.hywu_core.cluster import address, client, link, wire; "
            "assert not any(name.split('.')[0] == 'ray' for name in sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_ray_the_remedy_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ClusterError, match="pip install"):
        Address.parse("auto")
