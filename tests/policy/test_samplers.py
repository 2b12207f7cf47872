"""Engines: what they draw, what they are asked for, and every way in which a server can fail."""

from __future__ import annotations

import copy
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import cases
from policy.engine_server import Answer, Engine, serving
from stepscope.config import MeasureConfig, build_config
from stepscope.errors import BatchError, ConfigError
from stepscope.measure.mismatch import sampler_mismatch
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.passes import Budget
from stepscope.policy.rollouts import SamplingOptions, sample_rollouts
from stepscope.policy.sampling import server
from stepscope.policy.sampling.base import Decoding, Sampler
from stepscope.policy.sampling.continuous import ContinuousSampler
from stepscope.policy.sampling.decoded import score_decoding
from stepscope.policy.sampling.generate import TransformersSampler
from stepscope.policy.sampling.server import ServerSampler
from stepscope.policy.sampling.weights import write_merged
from stepscope.policy.state import Policy
from stepscope.results import Rollouts

SETTINGS = StepSettings(temperature=0.8, max_response_tokens=6)


@pytest.fixture
def policy(tokenizer: Any) -> Policy:
    return Policy(model=cases.model(), tokenizer=tokenizer, settings=SETTINGS)


def drawn(policy: Policy, letters: Any, sampler: Sampler, *, prompts: int = 6, seed: int = 3) -> Rollouts:
    return sample_rollouts(
        policy,
        letters,
        num_prompts=prompts,
        group_size=2,
        seed=seed,
        options=SamplingOptions(sampler=sampler),
    )


def at(url: str, **options: Any) -> ServerSampler:
    return ServerSampler(url=url, **{"wait": 0.01, "retries": 2, "timeout": 20.0, **options})


CONVENTIONS = ("raw", "tempered", "processed")


@pytest.mark.parametrize("logprobs", CONVENTIONS)
def test_a_servers_log_probs_become_those_of_what_it_drew_from(
    policy: Policy, letters: Any, logprobs: str
) -> None:
    decoding = Decoding(temperature=1.3, top_k=6, top_p=0.9)
    engine = Engine(policy.model, logprobs=logprobs)
    with serving(engine) as url:
        batch = drawn(policy, letters, at(url, decoding=decoding))
    assert batch.sampler_logprobs is not None
    assert batch.decoding_logprobs is not None
    for own, theirs in zip(batch.decoding_logprobs, batch.sampler_logprobs, strict=True):
        np.testing.assert_allclose(own, theirs, atol=2e-5)
    figures = sampler_mismatch(batch).figures  # type: ignore[union-attr]
    assert figures["engine_difference"].value < 1e-5
    assert figures["mass_lost"].value > 0.01
    assert figures["k1_per_token"].value == pytest.approx(figures["settings_k1_per_token"].value, abs=1e-5)


@pytest.mark.parametrize("ids", ["token_ids", "response_token_ids", "tokens"])
def test_the_request_says_everything_and_repeats(policy: Policy, letters: Any, ids: str) -> None:
    engine = Engine(policy.model, ids=ids)
    with serving(engine) as url:
        one = drawn(policy, letters, at(url))
        again = drawn(policy, letters, at(f"{url}/v1/", concurrency=1, model="policy"))
        other = drawn(policy, letters, at(url), seed=4)
    assert one.response_token_ids == again.response_token_ids
    assert one.response_token_ids != other.response_token_ids
    assert one.decoding_logprobs is None  # the policy's own temperature, nothing cut
    assert len({body["seed"] for body in engine.bodies[:12]}) == 12
    body = engine.bodies[0]
    assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"]) == (0.8, 1.0, -1, 0.0)
    assert body["repetition_penalty"] == 1.0
    assert body["stop_token_ids"] == [1]
    assert sampler_mismatch(one).doubt == ""  # type: ignore[union-attr]
    assert one.advantages is not None


def test_sglangs_own_api(policy: Policy, letters: Any) -> None:
    engine = Engine(policy.model, logprobs="tempered", order=("top_p", "top_k", "min_p"))
    decoding = Decoding(top_p=0.8, top_k=4)
    with serving(engine) as url:
        batch = drawn(policy, letters, at(url, api="sglang", decoding=decoding))
    assert sampler_mismatch(batch).figures["engine_difference"].value < 1e-5  # type: ignore[union-attr]
    assert engine.bodies[0]["sampling_params"]["max_new_tokens"] == 6
    assert engine.bodies[0]["return_logprob"] is True


def test_an_adapter_is_served_merged(policy: Policy, letters: Any, tmp_path: Any) -> None:
    adapted = replace(policy, model=cases.adapted(cases.model()))
    before = {n: p.clone() for n, p in adapted.model.named_parameters()}
    write_merged(adapted, tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in adapted.model.named_parameters())
    from transformers import AutoModelForCausalLM

    with serving(Engine(AutoModelForCausalLM.from_pretrained(tmp_path).eval())) as url:
        batch = drawn(adapted, letters, at(url))
    assert sampler_mismatch(batch).figures["difference"].value < 1e-5  # type: ignore[union-attr]
    with serving(Engine(cases.model())) as url, pytest.raises(BatchError, match=r"--lora-modules policy="):
        drawn(adapted, letters, at(url))


def test_another_policy_is_refused_and_one_nearby_doubted(policy: Policy, letters: Any) -> None:
    with (
        serving(Engine(cases.model(seed=1))) as url,
        pytest.raises(
            BatchError, match=r"does not serve this policy: .* expected less than 0\.05; serve the"
        ),
    ):
        drawn(policy, letters, at(url))
    near = copy.deepcopy(policy.model)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    with serving(Engine(near)) as url:
        found = sampler_mismatch(drawn(policy, letters, at(url), prompts=20))
    assert found is not None
    assert 0.05 < found.figures["difference"].value < 0.5
    assert "nats from the policy's on average" in found.doubt


def test_a_server_that_does_not_truncate_is_refused(policy: Policy, letters: Any) -> None:
    engine = Engine(policy.model, logprobs="raw", ignores_truncation=True)
    with serving(engine) as url, pytest.raises(BatchError, match="does not truncate as it was asked"):
        drawn(policy, letters, at(url, decoding=Decoding(top_k=2)))


INSTEAD: dict[str, tuple[Decoding, dict[str, Any], str]] = {
    "cooler": (Decoding(), {"temperature": 0.5}, "more probable"),
    "hotter": (Decoding(), {"temperature": 1.2}, "less probable"),
    "greedy": (Decoding(), {"top_k": 1}, "more probable"),
    "truncated": (Decoding(), {"top_p": 0.7}, "more probable"),
    "not as cool as asked": (Decoding(temperature=0.5), {"temperature": 0.8}, "less probable"),
}


@pytest.mark.parametrize("name", INSTEAD)
def test_a_server_that_draws_otherwise_is_refused(policy: Policy, letters: Any, name: str) -> None:
    """Its log-probs before temperature and truncation are the policy's, whatever it draws by."""
    decoding, instead, how = INSTEAD[name]
    with (
        serving(Engine(policy.model, logprobs="raw", instead=instead)) as url,
        pytest.raises(BatchError, match=f"does not draw as it was told: .* {how} on average"),
    ):
        drawn(policy, letters, at(url, decoding=decoding), prompts=32)
    with serving(Engine(policy.model, logprobs="raw")) as url:
        drawn(policy, letters, at(url, decoding=decoding), prompts=32)


def test_what_is_drawn_is_as_probable_as_the_policy_says(policy: Policy, letters: Any) -> None:
    """H(q) and Var[log q] are those of the distribution that truncation leaves, by numpy."""
    sampler = TransformersSampler(decoding=Decoding(temperature=1.3, top_k=6, min_p=0.02))
    batch = drawn(policy, letters, sampler, prompts=32)
    said = score_decoding(policy, batch, sampler.decoding, order=sampler.order)
    ids = [*batch.prompt_token_ids[0], *batch.response_token_ids[0]]
    with torch.no_grad():
        logits = policy.model(torch.tensor([ids[:-1]])).logits[0, -1].double().numpy() / 1.3
    p = np.exp(logits - logits.max())
    p[np.argsort(-p)[6:]] = 0
    p[p < 0.02 * p.max()] = 0
    p = p[p > 0] / p.sum()
    assert said.surprises[0][-1] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-5)
    spread = (p * np.log(p) ** 2).sum() - (p * np.log(p)).sum() ** 2
    assert said.variances[0][-1] == pytest.approx(spread, rel=1e-4)
    off = np.concatenate(said.by_convention["processed"]) + np.concatenate(said.surprises)
    assert abs(off.sum()) < 4 * np.sqrt(np.concatenate(said.variances).sum())


def changed(path: tuple[Any, ...], value: Any) -> Any:
    """A fault that puts a value into every answer, or makes one of what stands there."""

    def fault(number: int, answer: Answer) -> Answer:
        content = copy.deepcopy(answer[1])
        place = content
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value(place[path[-1]]) if callable(value) else value
        return answer[0], content

    return fault


LOGPROBS = ("choices", 0, "logprobs", "token_logprobs")
FAULTS: dict[str, tuple[Any, str]] = {
    "missing log-probs": (changed(("choices", 0, "logprobs"), None), "no log-probs .* use one that gives"),
    "too few log-probs": (changed(LOGPROBS, lambda v: v[:-1]), "log-probs for .* expected one for each"),
    "a log-prob that is none": (changed(LOGPROBS, lambda v: [None] * len(v)), "a log-prob of None"),
    "a clamped log-prob": (changed(LOGPROBS, lambda v: [-9999.0] * len(v)), "a log-prob of -9999"),
    "positive": (changed(LOGPROBS, lambda v: [0.5] * len(v)), "a log-prob of 0.5, expected a finite"),
    "unknown token": (changed(("choices", 0, "token_ids", 0), 99), "token 99, and the model knows 0 to 22"),
    "no integers": (
        changed(("choices", 0, "token_ids"), lambda v: list(map(str, v))),
        "expected a list of int",
    ),
    "nothing": (changed(("choices", 0, "token_ids"), []), "token ids are \\[\\]"),
    "another prompt": (
        changed(("choices", 0, "prompt_token_ids"), lambda v: [0, *v]),
        "adds or drops tokens",
    ),
    "no choice": (changed(("choices",), []), "choices are \\[\\], expected one"),
    "malformed": (lambda number, answer: (200, "<html>busy</html>"), "expected JSON; is this the address"),
    "nested": (lambda number, answer: (200, "[" * 200_000), "expected JSON; is this the address"),
    "a list": (lambda number, answer: (200, [1]), "expected an object"),
    "broken off": (lambda number, answer: (200, b'{"choices": [{'), "failed 3 times, last with Remote"),
    "500s": (
        lambda number, answer: (500, "overloaded"),
        "failed 3 times, last with status 500: 'overloaded'",
    ),
    "400": (lambda number, answer: (400, "top_k: unknown"), "refuses with status 400: 'top_k: unknown'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(policy: Policy, letters: Any, name: str) -> None:
    fault, message = FAULTS[name]
    with serving(Engine(policy.model, fault=fault)) as url, pytest.raises(BatchError, match=message) as error:
        drawn(policy, letters, at(url), prompts=2)
    assert url in str(error.value)
    assert "\n" not in str(error.value)


def test_a_response_cut_short_is_refused(policy: Policy, letters: Any) -> None:
    def cut(number: int, answer: Answer) -> Answer:
        content = copy.deepcopy(answer[1])
        choice = content["choices"][0]
        choice["token_ids"] = [5, 5]
        choice["logprobs"]["token_logprobs"] = [-1.0, -1.0]
        return 200, content

    with (
        serving(Engine(policy.model, fault=cut)) as url,
        pytest.raises(BatchError, match="the engine was cut"),
    ):
        drawn(policy, letters, at(url), prompts=2)


def test_what_passes_is_tried_again(policy: Policy, letters: Any) -> None:
    def sometimes(number: int, answer: Answer) -> Answer | None:
        return (503, "starting") if number % 3 == 1 else None

    engine = Engine(policy.model)
    with serving(engine) as url:
        smooth = drawn(policy, letters, at(url, concurrency=1))
    engine = Engine(policy.model, fault=sometimes)
    with serving(engine) as url:
        rough = drawn(policy, letters, at(url, concurrency=1))
    assert len(engine.bodies) > len(rough)
    assert rough.response_token_ids == smooth.response_token_ids


def test_no_server_and_a_slow_one(policy: Policy, letters: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(BatchError, match=r"/v1/models failed 3 times, last with ConnectError"):
        drawn(policy, letters, at(f"http://127.0.0.1:{port}"))

    def slow(number: int, answer: Answer) -> Answer | None:
        time.sleep(0.5)
        return None

    began = time.perf_counter()
    with (
        serving(Engine(policy.model, fault=slow)) as url,
        pytest.raises(BatchError, match=r"ReadTimeout.*sampler\.timeout is 0\.1 s"),
    ):
        drawn(policy, letters, at(url, timeout=0.1, retries=0), prompts=2)
    assert time.perf_counter() - began < 10


def answering(head: bytes, piece: bytes = b"") -> tuple[socket.socket, str]:
    """A listener that sends this to whoever connects, and the piece again and again; and its address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def tell(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 " + head)
            while piece:
                time.sleep(0.02)
                connection.sendall(piece)

    def accept() -> None:
        with suppress(OSError):
            while True:
                tell(listener.accept()[0])

    threading.Thread(target=accept, daemon=True).start()
    return listener, f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("head", "piece", "message"),
    [
        (b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", "has not ended in time"),
        (b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"F4240\r\n" + b" " * 1_000_000 + b"\r\n", "MiB"),
        (b"200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd", b"", "DecodingError"),
        (b"503 Busy\r\nRetry-After: \xb2\r\nContent-Length: 0\r\n\r\n", b"", "status 503"),
        (b"302 Found\r\nLocation: http://a/\r\nContent-Length: 0\r\n\r\n", b"", "refuses with status 302"),
    ],
)
def test_answers_that_never_end_or_cannot_be_read(
    policy: Policy, letters: Any, monkeypatch: pytest.MonkeyPatch, head: bytes, piece: bytes, message: str
) -> None:
    monkeypatch.setattr(server, "LARGEST_ANSWER", 3 << 20)
    listener, url = answering(head, piece)
    with listener, pytest.raises(BatchError, match=message):
        drawn(policy, letters, at(url, timeout=1.0, retries=1), prompts=2)


@pytest.mark.parametrize("url", ["localhost:8000", "http://u:secret@a", "http://a?key=secret", "ftp://a", ""])
def test_an_address_is_one_and_holds_no_secret(url: str) -> None:
    with pytest.raises(ConfigError, match="http://HOST:PORT, without user, password") as error:
        ServerSampler(url=url)
    assert "secret" not in str(error.value)
    config = {"checkpoint": "a", "out": "b", "sampler": {"engine": "openai", "url": url}}
    with pytest.raises(ConfigError, match="http://HOST:PORT, without user, password") as error:
        build_config(MeasureConfig, config)
    assert "secret" not in str(error.value)
    with pytest.raises(ConfigError, match="is no URL"):
        ServerSampler(url="http://[::1")


def test_the_model_is_named(policy: Policy, letters: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(policy.model, names=("base", "policy"))
    with serving(engine) as url:
        with pytest.raises(ConfigError, match=r"serves base, policy; name the one"):
            drawn(policy, letters, at(url))
        with pytest.raises(ConfigError, match="and not other"):
            drawn(policy, letters, at(url, model="other"))
        with pytest.raises(ConfigError, match="SERVER_KEY is not set"):
            drawn(policy, letters, at(url, model="policy", key_variable="SERVER_KEY"))
        monkeypatch.setenv("SERVER_KEY", "abc")
        drawn(policy, letters, at(url, model="policy", key_variable="SERVER_KEY"), prompts=1)
    assert engine.bodies[0]["model"] == "policy"
    assert engine.headers[0]["Authorization"] == "Bearer abc"


@pytest.mark.parametrize("decoding", [Decoding(), Decoding(temperature=1.2, top_k=5, min_p=0.05)])
def test_continuous_batching_is_the_policys(policy: Policy, letters: Any, decoding: Decoding) -> None:
    """By transformers itself: seeds are honoured, log-probs are those of what is drawn from, adapters too."""
    if decoding != Decoding():
        policy = replace(policy, model=cases.adapted(policy.model))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    sampler = ContinuousSampler(decoding=decoding)
    one, again, other = (drawn(policy, letters, sampler, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.response_token_ids == again.response_token_ids
    assert one.response_token_ids != other.response_token_ids
    assert one.sampler_logprobs is not None
    own = one.logprobs if one.decoding_logprobs is None else one.decoding_logprobs
    for mine, theirs in zip(own, one.sampler_logprobs, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)
    assert (one.kept_masses is None) == (decoding == Decoding())


def test_continuous_batching_draws_from_the_policy(policy: Policy) -> None:
    from policy.test_rollouts import OneProblem

    short = replace(policy, settings=replace(SETTINGS, max_response_tokens=1))
    batch = sample_rollouts(
        short,
        OneProblem(),
        num_prompts=1,
        group_size=2000,
        seed=1,
        options=SamplingOptions(sampler=ContinuousSampler()),
        budget=Budget(max_sequences=500),
    )
    with torch.no_grad():
        logits = policy.model(torch.tensor([[7, 12, 7, 13]])).logits[0, -1]
    expected = torch.softmax(logits / 0.8, -1).numpy()
    found = np.bincount([ids[0] for ids in batch.response_token_ids], minlength=len(expected)) / 2000
    assert np.all(np.abs(found - expected) < 4.5 * np.sqrt(expected * (1 - expected) / 2000) + 1e-3)


def test_engines_refuse_warpers_of_ones_own(policy: Policy, letters: Any) -> None:
    class Own(Decoding):
        pass

    for sampler in (ContinuousSampler(decoding=Own()), at("http://127.0.0.1:1", decoding=Own())):
        with pytest.raises(ConfigError, match=r"not Own; use the transformers sampler"):
            drawn(policy, letters, sampler)
    with pytest.raises(ConfigError, match=r"top_p is 1\.5, expected above 0 and at most 1"):
        Decoding(top_p=1.5)


def test_the_default_has_no_log_probs_of_its_own_where_it_is_the_policy(policy: Policy, letters: Any) -> None:
    own = drawn(policy, letters, TransformersSampler(decoding=Decoding(temperature=0.8)))
    assert own.sampler_logprobs is None
    hot = drawn(policy, letters, TransformersSampler(decoding=Decoding(temperature=1.1)))
    assert hot.sampler_logprobs is not None
    assert hot.response_token_ids != own.response_token_ids
