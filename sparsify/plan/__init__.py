"""Estimates a recipe's memory, time and price before anything runs."""

from sparsify.plan.estimate import Plan, auto_sentence, make_plan, resolve_engine
from sparsify.plan.hardware import Hardware, named_hardware, this_machine
from sparsify.plan.report import plan_table

__all__ = [
    "Hardware",
    "Plan",
    "auto_sentence",
    "make_plan",
    "named_hardware",
    "plan_table",
    "resolve_engine",
    "this_machine",
]
