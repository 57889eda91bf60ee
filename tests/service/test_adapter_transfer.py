"""Adapters in and out of a running service, and their cards, over a socket."""

from __future__ import annotations

import io
import json
import shlex
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from safetensors.torch import load_file, save
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from adapters.lora_weights import LoraWeights
from adapters.peft_format import read_adapter, write_adapter
from adapters.store import AdapterStore
from service.cli import app
from service.engine.base_model import load_base_model
from tests.adapters.archives import contents, zipped
from tests.adapters.loras import random_lora
from tests.service.control_fixtures import BASE
from tests.service.real_service import RealService, serve_real


class _FromStore(dict[str, LoraWeights]):
    """The engine's adapters: what the store has."""

    def __init__(self, directory: Path, signature: Any) -> None:
        super().__init__()
        self._store, self._signature = AdapterStore(str(directory / "adapters"), directory / "cache"), signature

    def __missing__(self, digest: str) -> LoraWeights:
        return read_adapter(self._store.read(digest), self._signature, max_rank=64)


@pytest.fixture(scope="module")
def service(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealService]:
    base = load_base_model(str(tiny_llama_dir), quantization="none", name="tiny")
    signature = replace(base.signature, fingerprint=BASE.fingerprint)  # as the tests' control plane calls it
    base = replace(base, fingerprint=BASE.fingerprint, signature=signature)
    directory = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROOTSTOCK_BASE", str(tiny_llama_dir))
        with serve_real(base, directory, _FromStore(directory, base.signature)) as running:
            yield running


@pytest.fixture(scope="module")
def files(service: RealService, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A PEFT directory's two files."""
    directory = tmp_path_factory.mktemp("peft")
    signature = service.base.signature
    write_adapter(directory, random_lora(signature, seed=8), base_name="tiny", base=signature)
    return contents(directory)


def _import(
    service: RealService, archive: io.BytesIO, *, suffix: str = "mine", key: str | None = None, **fields: str
) -> httpx.Response:
    headers = {"authorization": f"Bearer {key or service.key}"}
    return httpx.post(
        f"{service.url}/v1/adapters",
        headers=headers,
        files={"file": ("mine.zip", archive)},
        data={"suffix": suffix, **fields},
        timeout=60,
    )


def _ask(service: RealService, model: str) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0}
    return service.http().post("/v1/chat/completions", json=body).raise_for_status()


def test_an_imported_adapter_answers_at_once_under_its_id_and_alias(
    service: RealService, files: dict[str, bytes]
) -> None:
    made = _import(service, zipped(files), alias="outside")
    assert made.status_code == 200, made.text
    adapter = made.json()
    assert adapter["id"] == f"ft:tiny:acme:mine:{adapter['digest'][:8]}"
    assert (adapter["origin"], adapter["job"], adapter["aliases"]) == ("import", None, ["outside"])
    for model in (adapter["id"], "outside"):
        answer = _ask(service, model)
        assert answer.headers["x-rootstock-adapter"] == adapter["digest"]
        assert answer.json()["model"] == adapter["id"]
    assert _import(service, zipped(files), alias="outside").json() == adapter  # a retry makes nothing new


def test_what_is_exported_plain_peft_loads_to_the_same_logits(
    service: RealService, files: dict[str, bytes], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    adapter = _import(service, zipped(files)).json()
    exported = service.http().get(f"/v1/adapters/{adapter['id']}/export").raise_for_status()
    assert "attachment" in exported.headers["content-disposition"]
    with zipfile.ZipFile(io.BytesIO(exported.content)) as archive:
        assert sorted(archive.namelist()) == ["README.md", *sorted(files)]
        archive.extractall(tmp_path)
    assert contents(tmp_path) == files
    ids = torch.arange(10, 30)[None]
    merged = LlamaForCausalLM.from_pretrained(tiny_llama_dir)
    with torch.no_grad():
        for name, pair in random_lora(service.base.signature, seed=8).modules.items():
            merged.get_parameter(f"{name}.weight").add_(pair.b @ pair.a * pair.scaling)
        theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_llama_dir), str(tmp_path))
        torch.testing.assert_close(theirs(input_ids=ids).logits, merged(input_ids=ids).logits, atol=2e-4, rtol=2e-4)


def test_an_export_comes_back_as_the_same_digest(service: RealService, files: dict[str, bytes]) -> None:
    adapter = _import(service, zipped(files)).json()
    exported = service.http().get(f"/v1/adapters/{adapter['id']}/export").content
    again = _import(service, io.BytesIO(exported), suffix="again").json()
    assert again["digest"] == adapter["digest"] and again["id"] != adapter["id"]


def test_a_gguf_is_exported_for_llama_cpp(service: RealService, files: dict[str, bytes], tmp_path: Path) -> None:
    adapter = _import(service, zipped(files)).json()
    exported = service.http().get(f"/v1/adapters/{adapter['id']}/export", params={"format": "gguf"}).raise_for_status()
    (tmp_path / "a.gguf").write_bytes(exported.content)
    names = {tensor.name for tensor in GGUFReader(tmp_path / "a.gguf").tensors}
    assert "blk.0.attn_q.weight.lora_a" in names and len(names) == 28


def _changed(files: dict[str, bytes], **config: object) -> dict[str, bytes]:
    return {**files, "adapter_config.json": json.dumps({**json.loads(files["adapter_config.json"]), **config}).encode()}


def _with_nan(files: dict[str, bytes], tmp_path: Path) -> dict[str, bytes]:
    path = tmp_path / "weights"
    path.write_bytes(files["adapter_model.safetensors"])
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    return {**files, "adapter_model.safetensors": save(tensors)}


def test_an_adapter_that_cannot_be_served_is_a_400_that_names_the_check(
    service: RealService, files: dict[str, bytes], tmp_path: Path
) -> None:
    refused = [
        ("base", zipped(_changed(files, base_model_name_or_path="other/base"))),
        ("unsupported", zipped(_changed(files, use_dora=True))),
        ("rank", zipped(_changed(files, r=4096))),
        ("match", zipped(_changed(files, target_modules=["wq"]))),
        ("finite", zipped(_with_nan(files, tmp_path))),
        ("files", zipped({**files, "../../x": b""})),
        ("archive", io.BytesIO(b"no zip")),
    ]
    before = len(service.http().get("/v1/adapters").json()["data"])
    for check, archive in refused:
        answer = _import(service, archive, suffix="bad")
        assert answer.status_code == 400, check
        error = answer.json()["error"]
        assert (error["code"], f"(check: {check})" in error["message"]) == ("invalid_adapter", True), error
    assert "use_dora" in _import(service, zipped(_changed(files, use_dora=True))).json()["error"]["message"]
    assert len(service.http().get("/v1/adapters").json()["data"]) == before


def test_a_form_that_is_not_understood_is_a_400_that_names_the_field(
    service: RealService, files: dict[str, bytes]
) -> None:
    for fields, param in (
        ({"suffix": "no/slash"}, "suffix"),
        ({"suffix": "x", "alias": "tiny"}, "alias"),
        ({"suffix": "x", "name": "y"}, "name"),
    ):
        answer = _import(service, zipped(files), **fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    without = service.http().post("/v1/adapters", data={"suffix": "x"}, files={"other": ("a", b"")})
    assert without.status_code == 400


def test_another_tenant_sees_neither_card_nor_export(service: RealService, files: dict[str, bytes]) -> None:
    model = _import(service, zipped(files)).json()["id"]
    theirs = httpx.Client(base_url=service.url, headers={"authorization": f"Bearer {service.control.zenith_key}"})
    with theirs:
        for path in (f"/v1/adapters/{model}/card", f"/v1/adapters/{model}/export", "/v1/adapters/outside/card"):
            assert theirs.get(path).status_code == 404


def test_the_cards_curl_works_as_it_stands_and_its_digest_is_in_the_answer(
    service: RealService, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = _import(service, zipped(files), alias="outside").json()
    card = service.http().get("/v1/adapters/outside/card").raise_for_status().json()
    assert (card["model"], card["digest"]) == (adapter["id"], adapter["digest"])
    assert service.key not in json.dumps(card)
    answers = [_run_curl(card["verification"]["curl"], service.key) for _ in range(2)]
    assert answers[0].headers[card["verification"]["header"]] == card["digest"]
    assert answers[0].json()["choices"] == answers[1].json()["choices"]
    assert answers[0].json()["choices"][0]["logprobs"]["content"]
    exported = _run_curl(card["verification"]["export"], service.key)
    assert zipfile.ZipFile(io.BytesIO(exported.content)).testzip() is None


def _run_curl(command: str, key: str) -> httpx.Response:
    """What the shell and curl would do with it."""
    words = shlex.split(command.replace("$ROOTSTOCK_API_KEY", key))
    assert words[:2] == ["curl", "-s"]
    headers = {}
    body = None
    for option, value in pairwise(words):
        if option == "-H":
            name, _, content = value.partition(": ")
            headers[name] = content
        if option == "-d":
            body = value
    return httpx.request("GET" if body is None else "POST", words[2], headers=headers, content=body, timeout=60)


def test_the_card_of_an_import_says_what_is_known_and_what_is_not(
    service: RealService, files: dict[str, bytes]
) -> None:
    plain = _changed(files, base_model_name_or_path=None)
    path = "adapter_model.safetensors"
    anonymous = {**plain, path: _without_metadata(files[path])}
    named = {**files, path: anonymous[path]}
    for suffix, content, checked in (("a", files, "fingerprint"), ("b", named, "name"), ("c", anonymous, "shapes")):
        model = _import(service, zipped(content), suffix=suffix).json()["id"]
        card = service.http().get(f"/v1/adapters/{model}/card").json()
        assert card["history"]["base"]["checked_by"] == checked
        assert (card["data"]["origin"], card["data"]["archive"]["filename"]) == ("import", "mine.zip")
        assert card["verification"]["reproduce"] is None


def _without_metadata(raw: bytes) -> bytes:
    from safetensors.torch import load

    return save(load(raw))


def test_a_card_is_markdown_when_that_is_accepted(service: RealService, files: dict[str, bytes]) -> None:
    model = _import(service, zipped(files)).json()["id"]
    http = service.http()
    for answer in (
        http.get(f"/v1/adapters/{model}/card", headers={"accept": "text/markdown"}),
        http.get(f"/v1/adapters/{model}/card", params={"format": "markdown"}),
    ):
        assert answer.headers["content-type"].startswith("text/markdown")
        assert answer.text.startswith(f"# `{model}`")
        assert "## How can an answer be verified?" in answer.text
    assert http.get(f"/v1/adapters/{model}/card", params={"style": "x"}).status_code == 400
    assert http.get(f"/v1/adapters/{model}/card", params={"format": "pdf"}).status_code == 400


def test_the_command_line_imports_a_directory_exports_it_and_shows_the_card(
    service: RealService, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROOTSTOCK_URL", service.url)
    monkeypatch.setenv("ROOTSTOCK_API_KEY", service.key)
    source = tmp_path / "mine"
    source.mkdir()
    for name, content in {**files, "optimizer.pt": b"not sent"}.items():
        (source / name).write_bytes(content)
    made = CliRunner().invoke(app, ["adapters", "import", str(source), "--suffix", "cli"])
    assert made.exit_code == 0, made.output
    model = made.stdout.split()[1]
    out = tmp_path / "out.zip"
    assert CliRunner().invoke(app, ["adapters", "export", model, "-o", str(out)]).exit_code == 0
    assert CliRunner().invoke(app, ["adapters", "import", str(out), "--suffix", "cli"]).stdout == made.stdout
    assert "When was it updated" in CliRunner().invoke(app, ["adapters", "card", model]).stdout
    empty = CliRunner().invoke(app, ["adapters", "import", str(tmp_path / "mine" / ".."), "--suffix", "x"])
    assert empty.exit_code == 2 and "adapter_config.json" in empty.stderr
