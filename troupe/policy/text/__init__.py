"""Text ↔ token ids, chats, and text completed by a policy."""
