"""What a picture is worth. Rewards never import the policy."""
