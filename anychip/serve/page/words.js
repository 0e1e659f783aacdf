// Every word of the page, in English and in Chinese.

export const WORDS = {
  en: {
    skip: "Skip to the question", newChat: "New conversation", conversations: "Conversations", conversation: "Conversation",
    settings: "Settings", close: "Close", language: "中文", theme: "Dark", themeLight: "Light", welcome: "What would you like to know?",
    privacy: "Conversations stay in this browser.", question: "Ask something", send: "Send", stop: "Stop",
    hint: "Enter sends, Shift+Enter starts a new line. Answers may be wrong.", system: "System message",
    temperature: "Temperature", topP: "Top-p", maxTokens: "Longest answer (tokens)", seed: "Seed", any: "any",
    defaults: "Empty fields use the model's own values.", reset: "Reset", done: "Done", thinking: "Thinking…", thought: "Thoughts",
    copy: "Copy", copied: "Copied", retry: "Retry", remove: "Remove", stopped: "Stopped", lost: "The connection was lost.",
    full: "The server is full. Try again in a moment.", answering: "Answering", answered: "Answer complete", you: "You",
    model: "Model", tokensPerSecond: "tokens/s", cut: "The answer reached its longest length.",
  },
  zh: {
    skip: "跳到提问框", newChat: "新对话", conversations: "对话列表", conversation: "对话内容",
    settings: "设置", close: "关闭", language: "English", theme: "深色", themeLight: "浅色", welcome: "想了解什么？",
    privacy: "对话只保存在此浏览器中。", question: "请输入问题", send: "发送", stop: "停止",
    hint: "回车发送，Shift+回车换行。回答可能有误。", system: "系统消息",
    temperature: "温度", topP: "Top-p", maxTokens: "最长回答（词元）", seed: "随机种子", any: "任意",
    defaults: "留空则使用模型自带的数值。", reset: "重置", done: "完成", thinking: "思考中…", thought: "思考过程",
    copy: "复制", copied: "已复制", retry: "重试", remove: "删除", stopped: "已停止", lost: "连接已断开。",
    full: "服务器已满，请稍后再试。", answering: "正在回答", answered: "回答完毕", you: "你",
    model: "模型", tokensPerSecond: "词元/秒", cut: "回答已达到最大长度。",
  },
};
