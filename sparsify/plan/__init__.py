"""What a recipe will need and do, estimated before it costs anything."""

from sparsify.plan.estimate import Plan, make_plan
from sparsify.plan.table import plan_table

__all__ = ["Plan", "make_plan", "plan_table"]
