"""Settings: read from flags and environment, and a bad one stops start-up with a message that helps."""

from __future__ import annotations

from pathlib import Path

import pydantic
import pytest

from service.config import BUNDLED_BASE, Settings, SettingsError, load_settings


def test_the_environment_sets_what_flags_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOTSTOCK_PORT", "8123")
    monkeypatch.setenv("ROOTSTOCK_OPS_PORT", "9123")
    monkeypatch.setenv("ROOTSTOCK_KV_CACHE_BYTES", "64MiB")
    settings = load_settings({"port": "8124"})
    assert (settings.port, settings.ops_port, settings.kv_cache_bytes) == (8124, 9123, 64 * 1024**2)


def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOTSTOCK_ADMIN_KEY", "")
    assert load_settings().admin_key is None


def test_without_settings_the_bundled_base_is_served_from_a_local_directory() -> None:
    settings = load_settings({"data_dir": "/srv/data"}, environ={})
    assert settings.base == str(BUNDLED_BASE) and BUNDLED_BASE.parts[-2:] == ("bases", "tiny")
    assert settings.resolved_database_url == "sqlite:////srv/data/rootstock.db"
    assert settings.resolved_storage_url == str(Path("/srv/data/storage"))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"port": "eighty"}, "--port (ROOTSTOCK_PORT): Input should be a valid integer"),
        ({"ops_port": 70000}, "--ops-port (ROOTSTOCK_OPS_PORT): Input should be less than or equal to 65535"),
        ({"quantization": "fp4"}, "--quantization (ROOTSTOCK_QUANTIZATION): Input should be 'nf4', 'int8' or 'none'"),
        ({"kv_cache_bytes": "a lot"}, "--kv-cache-bytes (ROOTSTOCK_KV_CACHE_BYTES): could not parse value and unit"),
        ({"prefill_chunk": 1024}, "max_num_batched_tokens=512 is too small"),
        ({"max_num_batched_tokens": 159}, "max_num_seqs=32 and one prefill_chunk=128, so it must be at least 160"),
        ({"port": 9400}, "port and ops_port must differ"),
        ({"itl_target_ms": 0}, "--itl-target-ms (ROOTSTOCK_ITL_TARGET_MS): Input should be greater than 0"),
        ({"itl_target_ms": "inf"}, "--itl-target-ms (ROOTSTOCK_ITL_TARGET_MS): Input should be a finite number"),
        ({"training_share": 1.2}, "--training-share (ROOTSTOCK_TRAINING_SHARE): Input should be less than or equal"),
        ({"prot": 1}, "--prot (ROOTSTOCK_PROT): Extra inputs are not permitted"),
    ],
)
def test_a_bad_setting_is_named_with_its_flag_and_its_variable(given: dict[str, object], complaint: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(given, environ={})
    assert complaint in str(caught.value)


def test_a_misspelt_variable_is_not_ignored() -> None:
    with pytest.raises(SettingsError, match="ROOTSTOCK_PRT is not a setting: did you mean ROOTSTOCK_PORT"):
        load_settings(environ={"ROOTSTOCK_PRT": "1", "ROOTSTOCK_URL": "http://x", "PATH": "/bin"})


def test_variables_that_kubernetes_injects_are_explained() -> None:
    with pytest.raises(SettingsError, match="enableServiceLinks: false"):
        load_settings(environ={"ROOTSTOCK_SERVICE_HOST": "10.0.0.1"})


def test_settings_do_not_change_and_do_not_show_the_admin_key() -> None:
    settings = load_settings({"admin_key": "swordfish-swordfish"}, environ={})
    with pytest.raises(pydantic.ValidationError):
        settings.port = 1  # type: ignore[misc]
    assert "swordfish" not in repr(settings)


def test_every_setting_says_what_it_does() -> None:
    assert all(field.description for field in Settings.model_fields.values())
