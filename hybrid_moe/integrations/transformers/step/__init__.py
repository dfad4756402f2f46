"""What a decode step does between the jobs of its layers."""
