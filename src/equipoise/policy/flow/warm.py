"""Compiles every loop of `flow` when it is imported: for a process that ranks are forked from."""

from equipoise.policy.flow import warm_up

warm_up()
