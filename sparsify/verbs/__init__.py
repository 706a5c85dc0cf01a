"""What each verb of the command line does, without parsing or printing."""
