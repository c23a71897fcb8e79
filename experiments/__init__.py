"""Many runs compared: sweeps, the report's tables again, number formats side by side."""
