"""Money: keys, prices, limits, and a ledger that adds up. The server asks it four things:

    authenticate    who calls
    reserve         may this run: hold what it can cost, or say how much too little there is
    settle          it has ended: charge what was computed, and write it down for good
    report          what was used and what it cost

`meter.py` has the shape of the questions, `paid.py` the answers with a store, `free.py` those without; `opening.py`
opens a store. `office.py` is for whoever runs the server. Knows neither HTTP nor torch, and no text.
"""
