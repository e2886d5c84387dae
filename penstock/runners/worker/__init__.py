"""What runs where the work runs: call the user's function and write down how it went.

Every runner ends up in `execution.execute`. Clusters get this folder as source, under a name of its own: so its
modules import the standard library and one another, by relative imports only, and nothing else of penstock
(`cloudpickle` is used where the back end brings it). How it gets there: `shipment`.
"""
