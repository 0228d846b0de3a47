// Renders conversations with a template as Ollama does: text/template, the same variables, the same joining of messages
// (ollama/ollama, template/template.go). Reads {"template", "conversations"} from standard input, writes the texts.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type question struct {
	Template      string      `json:"template"`
	Conversations [][]message `json:"conversations"`
}

// collate joins neighbours of one role by an empty line, and collects what the system says.
func collate(given []message) (string, []message) {
	var system []string
	var joined []message
	for _, m := range given {
		if m.Role == "system" {
			system = append(system, m.Content)
		}
		if last := len(joined) - 1; last >= 0 && joined[last].Role == m.Role && m.Role != "tool" {
			joined[last].Content += "\n\n" + m.Content
		} else {
			joined = append(joined, m)
		}
	}
	return strings.Join(system, "\n\n"), joined
}

func render(asked question) ([]string, error) {
	toJSON := func(v any) string { encoded, _ := json.Marshal(v); return string(encoded) }
	parsed, err := template.New("").Option("missingkey=zero").Funcs(template.FuncMap{"json": toJSON}).Parse(asked.Template)
	if err != nil {
		return nil, err
	}
	texts := []string{}
	for _, conversation := range asked.Conversations {
		system, messages := collate(conversation)
		var text bytes.Buffer
		values := map[string]any{"System": system, "Messages": messages, "Response": ""}
		if err := parsed.Execute(&text, values); err != nil {
			return nil, err
		}
		texts = append(texts, text.String())
	}
	return texts, nil
}

func main() {
	var asked question
	err := json.NewDecoder(os.Stdin).Decode(&asked)
	var texts []string
	if err == nil {
		texts, err = render(asked)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(texts); err != nil {
		os.Exit(1)
	}
}
