"""Launch plans of the custom ops: data from which kernels are launched, counted and budgeted.

Torch-free and device-free; used by the plugins' enqueue, the passes and the planner.
"""

from collections.abc import Mapping

from v4graph.launch import (
    attention,
    compress,
    hyper,
    index,
    linear,
    moe,
    prep,
    prep_compress,
    project,
    route,
)
from v4graph.launch.plan import Argument, Launch, Launches, LaunchPlan, Step, evaluate_plan

ALL_PLANS: tuple[LaunchPlan, ...] = (
    hyper.PRE,
    hyper.POST,
    hyper.HEAD,
    prep.RMS_NORM,
    linear.LINEAR,
    linear.LINEAR_F32,
    linear.FP8_LINEAR,
    prep.ATTENTION_PREP,
    compress.PLAN,
    index.PLAN,
    attention.WINDOW,
    attention.COMPRESSED,
    attention.SELECTED,
    linear.GROUPED,
    linear.FP8_GROUPED,
    route.TOPK,
    route.HASH,
    moe.FP4,
    moe.FP8,
    moe.FLOAT,
    hyper.POST_PRE,
    project.WINDOW,
    project.HCA,
    project.CSA,
    project.QUERY,
    project.CSA_QUERY,
    prep_compress.HCA,
    prep_compress.CSA,
)

PLANS: Mapping[str, LaunchPlan] = {plan.op: plan for plan in ALL_PLANS}

__all__ = ["ALL_PLANS", "PLANS", "Argument", "Launch", "LaunchPlan", "Launches", "Step", "evaluate_plan"]
