"""What measured routing gives for each amount of GPU memory: hit rate and speed."""

from __future__ import annotations

from hybrid_moe.placement.cost_placement import place_for_budgets
from hybrid_moe.planning.hot_choice import Use, costs_of, first_ids, hot_bytes, placed
from hybrid_moe.planning.model import HotExperts, Model
from hybrid_moe.planning.plan import BudgetPoint, MeasuredRouting, Plan, Request
from hybrid_moe.planning.prediction import predict_decode

SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of the bytes of all experts."""


def budget_curve(plan: Plan, routing: MeasuredRouting) -> tuple[BudgetPoint, ...]:
    """Points of the curve, ascending: `SHARES`, and what the plan has.

    Raises:
        ValueError: the routing is that of another model.
    """
    model, request = plan.model, plan.request
    costs, use = costs_of(model, request, routing)
    everything = sum(layer.num_experts * layer.on_gpu for layer in model.layers)
    own = hot_bytes(model, plan.hot)
    budgets = sorted({own, *(int(share * everything) for share in SHARES)})
    points = []
    for budget, placement in zip(budgets, place_for_budgets(costs, budgets), strict=True):
        hot = plan.hot if budget == own else placed(placement, routing, use)
        count = int(budget / everything * model.num_experts)
        uniform = _measured(first_ids(model, count, "the first ids"), use)
        points.append(
            BudgetPoint(
                nbytes=budget,
                share=budget / everything,
                hit_rate=hot.hit_rate(model.layers),
                tokens_per_second=_speed(model, request, hot, plan),
                first_ids_hit_rate=uniform.hit_rate(model.layers),
                first_ids_tokens_per_second=_speed(model, request, uniform, plan),
                chosen=budget == own,
            )
        )
    return tuple(points)


def _measured(hot: HotExperts, use: Use) -> HotExperts:
    return HotExperts(hot.counts, hot.rule, hot.profile, use)


def _speed(model: Model, request: Request, hot: HotExperts, plan: Plan) -> float:
    return predict_decode(model, hot, request.cpu, request.gpus, plan.cache).tokens_per_second
