"""The dispatcher sends each token to slots: to replicas of the experts that the router chose."""
