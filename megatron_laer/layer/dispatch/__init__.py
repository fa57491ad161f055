"""Token dispatchers to slots: to replicas of the experts that the router chose."""
