"""What was asked once about planning and costs, and may be asked again."""
