"""What a recipe will need and do, estimated before it costs anything."""

from sparsify.plan.auto import auto_sentence, resolve_engine
from sparsify.plan.estimate import Plan, make_plan
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
