"""The operator: validate, plan, route, gate_up, down, combine."""
