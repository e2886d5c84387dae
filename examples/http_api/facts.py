"""Ask an API for a fact, and take the text out of the answer."""

import sys

import requests

from penstock import flow, task


@task
def call_api(url):
    response = requests.get(url, timeout=10)
    print(response.status_code)
    return response.json()


@task
def parse_fact(response):
    fact = response["fact"]
    print(fact)
    return fact


@flow
def api_flow(url):
    fact_json = call_api(url)
    fact_text = parse_fact(fact_json)
    return fact_text


if __name__ == "__main__":
    api_flow(sys.argv[1])
