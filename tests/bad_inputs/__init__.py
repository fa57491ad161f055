"""Bad inputs of every command, tried on whole commands; see tests/tools/test_bad_inputs.py."""
