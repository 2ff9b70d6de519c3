"""What people read: the pages of a report and of a study, and the card of an exported folder."""
