"""Bad inputs of every command, tried on whole commands; see tests/unit/test_bad_inputs.py."""
