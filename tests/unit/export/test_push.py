"""Uploads through the hub's own client to a server of this test; what stands in the way is found before any work."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from qlora_train.errors import MachineError, ModelError, RecipeError
from qlora_train.export import push as push_module
from qlora_train.export.formats import run as formats_module
from qlora_train.export.push import check_push, push
from tests.commandline import run_cli


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files asks for."""

    created: dict[str, Any]
    files: dict[str, bytes]
    repositories: dict[str, dict[str, bytes]]  # files of each
    messages: list[str]  # of the commits
    refuses: str | None = None  # a repository that takes nothing; "" for all
    role = "write"  # of the token

    def do_GET(self) -> None:
        auth = {"type": "access_token", "accessToken": {"displayName": "mine", "role": self.role}}
        self._answer({"type": "user", "name": "me", "orgs": [{"name": "team"}], "auth": auth})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.refuses == "" or (self.refuses and f"/{self.refuses}/" in self.path):
            self._answer({"error": "no room"}, 507)
        elif self.path == "/api/repos/create":
            type(self).created = json.loads(body)
            self._answer({"url": f"{self._address}/me/model", "name": "me/model"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif "/commit/" in self.path:
            repository = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    type(self).files[line["value"]["path"]] = content
                    self.repositories.setdefault(repository, {})[line["value"]["path"]] = content
                else:
                    self.messages.append(line["value"]["summary"])
            address = f"{self._address}/me/model/commit/abc"
            self._answer({"commitUrl": address, "commitOid": "abc", "hookOutput": "", "success": True})
        else:
            self._answer({})  # validation of the card

    @property
    def _address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A server, and a client that takes it for the hub."""
    Hub.created, Hub.files, Hub.repositories, Hub.messages, Hub.refuses, Hub.role = {}, {}, {}, [], None, "write"
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    real = push_module.HfApi
    monkeypatch.setattr(push_module, "HfApi", lambda: real(endpoint=address, token="hf_test"))
    monkeypatch.setattr(push_module, "get_token", lambda: "hf_test")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_folder_is_uploaded_whole_into_a_private_repository(hub: type[Hub], tmp_path: Path) -> None:
    content = {"README.md": b"---\nlicense: mit\n---\n", "config.json": b"{}", "model.safetensors": b"weights"}
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    check_push("me/model")
    check_push("team/model")
    assert push(tmp_path, "me/model").endswith("/me/model/commit/abc")
    assert hub.files == content
    assert hub.created["name"] == "model" and hub.created["visibility"] == "private"


def test_an_owner_that_the_token_is_not_of_is_refused(hub: type[Hub]) -> None:
    with pytest.raises(MachineError, match="the token is of me, which is no member of other"):
        check_push("other/model")


def test_a_token_that_may_only_read_is_refused(hub: type[Hub]) -> None:
    hub.role = "read"
    with pytest.raises(MachineError, match="may read from the hub, and not write there"):
        check_push("me/model")


def test_a_format_is_uploaded_with_its_card(hub: type[Hub], made: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made / "run", tmp_path / "run"))
    outcome = run_cli("export", run, tmp_path / "q", "export.verify_rows=2", "--format", "gguf-q8_0", "--push", "me/q")
    assert outcome.code == 0, outcome.err
    assert "uploaded gguf-q8_0: http://" in outcome.out and "uploading gguf-q8_0 to me/q" in outcome.err
    (found,) = hub.repositories.values()
    assert found.keys() >= {"model-Q8_0.gguf", "Modelfile", "golden_prompts.json", "export.json", "README.md"}
    assert found["model-Q8_0.gguf"] == (tmp_path / "q" / "model-Q8_0.gguf").read_bytes()
    card = found["README.md"].decode()
    assert "library_name: gguf" in card and "hf download" in card and "## Trained on" in card
    assert "base_model:" not in card, "a folder is no model on the hub"
    assert str(made) not in card and str(made) not in found["export.json"].decode(), "nor anyone's to know"
    assert hub.messages == ["Upload gguf-q8_0"]


def test_several_formats_have_a_repository_each(hub: type[Hub], made: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made / "run", tmp_path / "run"))
    asked = ("--format", "lora", "--format", "gguf-lora", "--push", "me/m")
    hub.refuses = "me/m-lora"
    outcome = run_cli("export", run, tmp_path / "out", "export.verify_rows=2", *asked)
    assert outcome.code == 6 and f"hf upload me/m-lora {tmp_path / 'out' / 'lora'}" in outcome.err, outcome.err
    assert hub.repositories.keys() == {"me/m-gguf-lora"}, "the other is uploaded all the same"
    assert "adapter.gguf" in hub.repositories["me/m-gguf-lora"]
    card = (tmp_path / "out" / "lora" / "README.md").read_text()
    assert "library_name: peft" in card and "vllm serve model --enable-lora" in card
    assert str(made) not in card


def test_what_was_published_is_uploaded_where_a_later_format_is_refused(
    hub: type[Hub], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = formats_module._publish

    def refuse_second(job: Any, measured: Any, name: str, *rest: Any) -> Any:
        if name == "gguf-lora":
            raise ModelError("too far from the trained model", fix="none")
        return publish(job, measured, name, *rest)

    monkeypatch.setattr(formats_module, "_publish", refuse_second)
    run = Path(shutil.copytree(made / "run", tmp_path / "run"))
    asked = ("--format", "lora", "--format", "gguf-lora", "--push", "me/m")
    outcome = run_cli("export", run, tmp_path / "out", "export.verify_rows=2", *asked)
    assert outcome.code == 4 and "too far" in outcome.err, outcome.err
    assert hub.repositories.keys() == {"me/m-lora"} and "uploaded lora: " in outcome.out + outcome.err


@pytest.mark.parametrize(("repository", "code"), [("model", 2), ("other/model", 6)])
def test_what_stands_in_the_way_of_a_format_is_found_before_any_work(
    repository: str, code: int, hub: type[Hub], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_train.export.formats.run.measure_trained", lambda *_: pytest.fail("that is work"))
    outcome = run_cli("export", made / "run", tmp_path / "out", "--format", "lora", "--push", repository)
    assert outcome.code == code and "--push" in outcome.err and not hub.repositories
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_refuses_leaves_the_folder_and_says_how_to_go_on(hub: type[Hub], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    hub.refuses = ""
    with pytest.raises(MachineError, match="the upload to me/model failed") as caught:
        push(tmp_path, "me/model")
    assert f"hf upload me/model {tmp_path} --private" in str(caught.value), "else the hub makes a public one"
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize("name", ["model", "me/", "/model", "a/b/c", "me/mo del", "../x", "me/a--b", "me/m.git"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="no name on the hub"):
        check_push(name)


def test_offline_and_without_a_token_it_ends_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MachineError, match="HF_HUB_OFFLINE is set"):
        check_push("me/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(push_module, "get_token", lambda: None)
    with pytest.raises(MachineError, match="hf auth login"):
        check_push("me/model")
