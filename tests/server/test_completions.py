"""Completions by the public client: the plain model's tokens, whole and as they come."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from equipoise.bundled import model_directory
from equipoise.job.texts import encode
from equipoise.models.loading import load_model, load_tokenizer
from tests.server.serving import Running, make_spec, read_events, serve

PROMPTS = (
    "def main(",
    "The clocks agreed, and nobody",
    "#include <stdio.h>\nint",
    "Il était une fois un",
    "import ",
    "Return the",
)
MAX_TOKENS = 12
MODEL = "model"
"""The bundled directory's name."""


@pytest.fixture(scope="module")
def plain() -> dict[str, str]:
    """What the plain model says, by greedy decoding."""
    model: Any = load_model(model_directory(), torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(model_directory())
    said = {}
    for prompt in PROMPTS:
        tokens = torch.tensor([encode(tokenizer, prompt)])
        with torch.inference_mode():
            whole = model.generate(tokens, do_sample=False, max_new_tokens=MAX_TOKENS)
        new = whole[0, tokens.shape[1] :].tolist()
        said[prompt] = tokenizer.decode(new, skip_special_tokens=True)
    return said


def complete(client: openai.OpenAI, prompt: Any, **options: Any) -> Any:
    options = {"temperature": 0, "max_tokens": MAX_TOKENS, **options}
    return client.completions.create(model=MODEL, prompt=prompt, **options)


def test_greedy_text_is_the_plain_models_for_many_clients_at_once(
    running: Running, plain: dict[str, str]
) -> None:
    client = running.openai()

    def ask(number: int) -> tuple[str, str]:
        prompt = PROMPTS[number % len(PROMPTS)]
        if number % 2:
            return prompt, complete(client, prompt).choices[0].text
        chunks = complete(client, prompt, stream=True)
        return prompt, "".join(chunk.choices[0].text for chunk in chunks)

    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(ask, range(18)))
    assert [text for _, text in answers] == [plain[prompt] for prompt, _ in answers]


def test_a_whole_answer_says_what_it_took(running: Running, plain: dict[str, str]) -> None:
    answer = running.openai().completions.with_raw_response.create(
        model=MODEL, prompt=PROMPTS[0], temperature=0, max_tokens=MAX_TOKENS
    )
    completion = answer.parse()
    assert completion.id == f"cmpl-{answer.headers['x-request-id']}"
    assert (completion.object, completion.model) == ("text_completion", MODEL)
    assert completion.usage.to_dict() == {
        "prompt_tokens": len(PROMPTS[0]),
        "completion_tokens": MAX_TOKENS,
        "total_tokens": len(PROMPTS[0]) + MAX_TOKENS,
    }
    assert completion.choices[0].finish_reason == "length"
    assert completion.choices[0].text == plain[PROMPTS[0]]


def test_tokens_are_taken_as_a_prompt(running: Running, plain: dict[str, str]) -> None:
    tokens = list(encode(load_tokenizer(model_directory()), PROMPTS[1]))
    client = running.openai()
    for prompt in (tokens, [tokens], [PROMPTS[1]]):
        assert complete(client, prompt).choices[0].text == plain[PROMPTS[1]]


def test_a_stream_ends_with_its_reason_and_the_usage_where_asked_for(running: Running) -> None:
    body = {"prompt": PROMPTS[0], "max_tokens": 5, "temperature": 0, "stream": True}
    with running.http() as client:
        with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            events = read_events(answer.iter_lines())
        told = {**body, "stream_options": {"include_usage": True}}
        with client.stream("POST", "/v1/completions", json=told) as answer:
            with_usage = read_events(answer.iter_lines())
    assert events[-1] == with_usage[-1] == "[DONE]"
    assert all("usage" not in event for event in events[:-1])
    reasons = [event["choices"][0]["finish_reason"] for event in events[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert all(event["usage"] is None for event in with_usage[:-2])
    assert with_usage[-2]["choices"] == []
    assert with_usage[-2]["usage"]["completion_tokens"] == 5
    assert len({event["id"] for event in with_usage[:-1]}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(
    running: Running, plain: dict[str, str], stream: bool
) -> None:
    whole = plain[PROMPTS[1]]
    stop = whole[5:8]
    expected = whole[: whole.index(stop)]
    answer = complete(running.openai(), PROMPTS[1], stop=["\0", stop], stream=stream)
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].text for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].text, answer.choices[0].finish_reason
    assert (text, reason) == (expected, "stop")


def test_draws_are_the_seeds(running: Running, plain: dict[str, str]) -> None:
    client = running.openai()

    def draw(**options: Any) -> str:
        return str(complete(client, PROMPTS[2], temperature=1.5, **options).choices[0].text)

    assert draw(seed=5) == draw(seed=5)
    assert len({draw(seed=seed) for seed in (-1, 5, 6)}) > 1
    assert len({draw() for _ in range(3)}) > 1
    assert draw(top_p=1e-9, seed=1) == plain[PROMPTS[2]]
    for temperature in (1e-12, 2.3e-308, 5e-324):
        cold = complete(client, PROMPTS[2], temperature=temperature, seed=1)
        assert cold.choices[0].text == plain[PROMPTS[2]]


def test_without_a_number_a_completion_has_sixteen_tokens(running: Running) -> None:
    with running.http() as client:
        answer = client.post("/v1/completions", json={"prompt": "x", "ignore_eos": True}).json()
    assert answer["usage"]["completion_tokens"] == 16


def test_a_model_without_a_template_does_not_chat(running: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="has no chat template: use /v1/completions"):
        running.openai().chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hello"}]
        )


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, with a template."""
    folder = tmp_path_factory.mktemp("models") / "chatting"
    shutil.copytree(model_directory(), folder)
    path = folder / "tokenizer_config.json"
    template = (
        "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
        "{{ raise_exception('the system speaks first') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return folder


def test_a_chat_is_what_its_template_makes_of_it(chatting: Path) -> None:
    turns: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "He"}, {"type": "text", "text": "y"}],
        },
    ]
    with serve(make_spec(chatting), model_name="talker") as server:
        client = server.openai()
        chats = client.chat.completions
        said = client.completions.create(
            model="talker",
            prompt="system: Be brief.\nuser: Hey\nassistant:",
            temperature=0,
            max_tokens=8,
        )
        whole = chats.create(model="talker", messages=turns, temperature=0, max_tokens=8)
        chunks = list(
            chats.create(
                model="talker", messages=turns, temperature=0, max_completion_tokens=8, stream=True
            )
        )
        with pytest.raises(openai.BadRequestError, match="the system speaks first"):
            chats.create(model="talker", messages=turns[::-1])
    text = said.choices[0].text
    assert whole.choices[0].message.to_dict() == {"role": "assistant", "content": text}
    assert whole.usage is not None
    assert said.usage is not None
    assert whole.usage.prompt_tokens == said.usage.prompt_tokens
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "length"
