//! Tools as OpenAI has them: descriptions down, calls up, whole and as a stream, from every node of the cluster.

use crate::harness::*;

/// What an echo engine says back: text, and two calls in Hermes's format.
const SAID: &str = "Looking. <tool_call>\n{\"name\": \"weather\", \"arguments\": {\"zone\": \"é\", \"city\": 1.50}}\n\
                    </tool_call>\n<tool_call>{\"name\": \"clock\", \"arguments\": {}}</tool_call>";

fn request(said: &str) -> Value {
    let tool = |name: &str| json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}});
    let mut request = echo(said);
    request["tools"] = json!([tool("weather"), tool("clock")]);
    request
}

fn with(mut request: Value, name: &str, value: Value) -> Value {
    request[name] = value;
    request
}

#[tokio::test]
async fn tools_are_called_from_any_machine() {
    let (tower, mini) = tower_and_mini().await;
    for machine in [&tower, &mini] {
        let answer = machine.ask(&request(SAID)).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        let choice = &answer.body["choices"][0];
        assert_eq!(choice["finish_reason"], "tool_calls");
        assert_eq!(choice["message"]["content"], "Looking. ");
        let calls = choice["message"]["tool_calls"].as_array().unwrap();
        let functions: Vec<&Value> = calls.iter().map(|call| &call["function"]).collect();
        let expected = [
            json!({"name": "weather", "arguments": "{\"zone\": \"é\", \"city\": 1.50}"}),
            json!({"name": "clock", "arguments": "{}"}),
        ];
        assert_eq!(functions, expected.iter().collect::<Vec<_>>());
        assert_ne!(calls[0]["id"], calls[1]["id"]);

        let streamed = machine.stream(&request(SAID)).await.rest().await;
        streamed.is_whole("Looking. ");
        assert_eq!(streamed.finish_reason.as_deref(), Some("tool_calls"));
        let functions: Vec<&Value> = streamed.tool_calls.iter().map(|call| &call["function"]).collect();
        assert_eq!(functions, expected.iter().collect::<Vec<_>>());
        assert_eq!(streamed.tool_calls[1]["index"], 1);

        // The conversation goes on with the result.
        let mut next = request("thanks");
        let said = json!({"role": "assistant", "content": null, "tool_calls": calls});
        let result = json!({"role": "tool", "tool_call_id": calls[0]["id"], "content": "sunny"});
        next["messages"].as_array_mut().unwrap().splice(0..0, [said, result]);
        assert_eq!(machine.ask(&next).await.text(), "thanks");
    }
    let one = tower.ask(&with(request(SAID), "parallel_tool_calls", json!(false))).await;
    assert_eq!(one.body["choices"][0]["message"]["tool_calls"].as_array().unwrap().len(), 1);
    // Nothing is a call where none is wanted, or where it is broken.
    for plain in [echo(SAID), with(request(SAID), "tool_choice", json!("none"))] {
        let answer = tower.ask(&plain).await;
        assert_eq!((answer.text(), &answer.body["choices"][0]["finish_reason"]), (SAID, &json!("stop")));
    }
    let broken = "<tool_call>{\"name\": }</tool_call>";
    assert_eq!(tower.ask(&request(broken)).await.text(), broken);
    tower.stream(&request(broken)).await.rest().await.is_whole(broken);
    let forced = tower.ask(&with(request(SAID), "tool_choice", json!("required"))).await;
    assert_eq!((forced.status, forced.code()), (400, "unsupported_parameter"), "{}", forced.body);
}

#[tokio::test]
async fn a_model_whose_template_has_no_tools_says_so() {
    let mut tower = Machine::new("tower").model("default");
    tower.up().await;
    let answer = tower.ask(&with(request("hello"), "model", json!("default"))).await;
    assert_eq!((answer.status, answer.code()), (400, "unsupported_parameter"), "{}", answer.body);
    assert_eq!(answer.body["error"]["param"], "tools");
    assert!(answer.message().contains("this model's template has no tools"), "{}", answer.message());
}
