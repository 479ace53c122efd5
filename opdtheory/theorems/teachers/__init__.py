"""T16: several teachers, teachers beside a base policy, and temperatures."""
