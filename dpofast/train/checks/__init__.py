"""What is looked at before a run trains, so that mistakes show before hours are spent."""
