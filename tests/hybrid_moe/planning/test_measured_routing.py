"""Plans by measured routing: they fit, nothing as large is predicted faster; and the curve."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hybrid_moe.placement.profile import read_profile
from hybrid_moe.placement.ranks import experts_of_rank
from hybrid_moe.placement.routing_profile_file import write_routing_profile
from hybrid_moe.planning import MeasuredRouting, Model, Plan, make_plan, read_model
from hybrid_moe.planning.hot_choice import costs_of, first_ids
from hybrid_moe.planning.model import HotExperts
from hybrid_moe.planning.plan import GPU
from hybrid_moe.planning.prediction import predict_decode
from hybrid_moe.planning.serving import PLACEMENT_VARIABLE, server_command, write_placement
from tests.hybrid_moe.command import run
from tests.hybrid_moe.placement.routings import skewed_profile
from tests.hybrid_moe.planning.cases import request
from tests.hybrid_moe.planning.conftest import Fake


@pytest.fixture(scope="module")
def routing(tmp_path_factory: pytest.TempPathFactory) -> MeasuredRouting:
    """Of gpt-oss-20b."""
    path = tmp_path_factory.mktemp("routing") / "measured.json"
    profile = skewed_profile(tuple(range(24)), 32, 4, hidden=2880)
    write_routing_profile(path, profile)
    return MeasuredRouting(path, profile)


@pytest.fixture(scope="module")
def plan(gpt_oss: Model, routing: MeasuredRouting) -> Plan:
    return make_plan(gpt_oss, request("12GB", routing=routing))


def decode(plan: Plan, hot: HotExperts) -> float:
    """Predicted seconds of a token."""
    model, cpu, gpus = plan.model, plan.request.cpu, plan.request.gpus
    return 1 / predict_decode(model, hot, cpu, gpus, plan.cache).tokens_per_second


def test_it_fits_and_is_used(plan: Plan, gpt_oss: Model) -> None:
    assert not plan.shortages and plan.nbytes(GPU) <= plan.request.room
    # not one expert more would fit
    assert plan.nbytes(GPU) + gpt_oss.layers[0].on_gpu > plan.request.room
    assert "by cost, from measured.json" in plan.to_dict()["placement"]
    assert min(plan.hot.counts.values()) < plan.hot.most


def test_as_much_memory_for_other_experts_is_slower(plan: Plan, gpt_oss: Model) -> None:
    best = decode(plan, plan.hot)
    count = sum(plan.hot.counts.values())
    even = first_ids(gpt_oss, count // 24, "first ids")
    assert plan.hot.use is not None
    measured = HotExperts(even.counts, even.rule, None, plan.hot.use)
    assert plan.hot.hit_rate(gpt_oss.layers) > measured.hit_rate(gpt_oss.layers) + 0.1
    assert best < decode(plan, measured)


def test_the_solver_minimises_what_is_predicted(
    plan: Plan, gpt_oss: Model, routing: MeasuredRouting
) -> None:
    """A token takes what the solver's layers take, and the rest, which no placement changes."""
    costs, use = costs_of(gpt_oss, plan.request, routing)
    rest = []
    for count in (0, 5, 20, 32):
        hot = first_ids(gpt_oss, count, "first ids")
        hot = HotExperts(hot.counts, hot.rule, None, use)
        layers = zip(costs, gpt_oss.layers, strict=True)
        rest.append(decode(plan, hot) - sum(cost.seconds(hot.mask(at)) for cost, at in layers))
    assert rest == pytest.approx([rest[0]] * 4, rel=1e-9)


def test_the_curve(plan: Plan) -> None:
    curve = plan.curve
    assert [point.nbytes for point in curve] == sorted({point.nbytes for point in curve})
    speeds = [point.tokens_per_second for point in curve]
    assert speeds == sorted(speeds)
    assert (curve[0].hit_rate, curve[0].share, curve[-1].share) == (0, 0, 1)
    (own,) = (point for point in curve if point.chosen)
    assert own.tokens_per_second == pytest.approx(plan.decode.tokens_per_second)
    for point in curve:
        # near the end the GPU is the slower half, and more hits would be slower
        assert point.hit_rate >= point.first_ids_hit_rate or point.share > 0.7
        assert point.tokens_per_second >= point.first_ids_tokens_per_second * (1 - 1e-9)
    assert plan.to_dict()["curve"][0]["hit_rate"] == 0


def test_without_measured_routing_there_is_no_curve(gpt_oss: Model) -> None:
    assert make_plan(gpt_oss, request("12GB")).curve == ()


def test_slots_on_several_gpus(fake: Fake, routing: MeasuredRouting) -> None:
    """Whole experts: the fullest GPU counts."""
    model = read_model(fake("gpt-oss-20b"), gpu_backend="cute")
    plan = make_plan(model, request("3x8GB", routing=routing))
    assert not plan.shortages and plan.hot.most > 0
    assert plan.hot.profile is not None and plan.hot.use is not None
    fullest, dealt = 0.0, 0.0
    for layer, experts in plan.hot.profile.layers.items():
        ranks = plan.hot.profile.ranks[layer]
        assert sorted(expert for ids in ranks for expert in ids) == list(experts)
        by_id = [experts_of_rank(experts, layer, rank, 3) for rank in range(3)]
        assert list(map(len, ranks)) == list(map(len, by_id))
        use = plan.hot.use[layer]
        fullest += max(use[list(ids)].sum() for ids in ranks)
        dealt += max(use[list(ids)].sum() for ids in by_id)
    assert fullest < 0.9 * dealt
    written = write_placement(plan)
    assert written is not None and read_profile(written).ranks == plan.hot.profile.ranks


def test_too_little_memory_for_any_expert(gpt_oss: Model, routing: MeasuredRouting) -> None:
    plan = make_plan(gpt_oss, request("2GB", routing=routing))
    assert plan.hot.most == 0 and plan.shortages


def test_routing_of_another_model(fake: Fake, routing: MeasuredRouting) -> None:
    model = read_model(fake("gpt-oss-120b"))
    with pytest.raises(ValueError, match=r"measured\.json was measured on another model"):
        make_plan(model, request("24GB", routing=routing))


def test_impossible_requests(routing: MeasuredRouting) -> None:
    with pytest.raises(ValueError, match="not both"):
        request("24GB", routing=routing, num_gpu_experts=3)
    with pytest.raises(ValueError, match="need a GPU"):
        request(routing=routing)


def test_the_server_gets_a_placement(plan: Plan, routing: MeasuredRouting, gpt_oss: Model) -> None:
    file = write_placement(plan)
    assert file == routing.path.with_name("measured.placement.json")
    assert server_command(plan).environment[PLACEMENT_VARIABLE] == str(file)
    again = make_plan(gpt_oss, request("12GB", profile=read_profile(file)))
    assert again.hot.counts == plan.hot.counts
    assert again.nbytes(GPU) == plan.nbytes(GPU)
    assert write_placement(again) is None


def test_the_commands(fake: Fake, routing: MeasuredRouting, tmp_path: Path) -> None:
    speeds = ["--ram-bandwidth", 80, "--gmacs", 1000, "--threads", 16, "--ram", "64GB"]
    options = ["--gpu", "12GB", "--profile", routing.path, *speeds]
    model = fake("gpt-oss-20b")
    written = tmp_path / "plan.json"
    result = run("plan", model, *options, "--json", written, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    curve = json.loads(written.read_text())["curve"]
    shown = [line for line in result.output.splitlines() if re.search(r"│ *\d+ % *│", line)]
    assert len(shown) == len(curve)
    assert sum(" < " in line for line in shown) == 1
    served = run("serve", "--model", model, *options, "--dry-run", env={"COLUMNS": "120"})
    assert served.exit_code == 0, served.output
    assert f"{PLACEMENT_VARIABLE}={routing.placement_path}" in served.output
    assert routing.placement_path.is_file()
