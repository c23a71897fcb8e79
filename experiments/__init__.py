"""Many runs compared: sweeps, and the report's tables again."""
