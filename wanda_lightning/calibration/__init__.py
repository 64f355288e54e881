"""The one walk over the decoder layers, with what enters each."""
